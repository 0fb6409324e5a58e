"""Beta towards a KL, lam towards a radius, and when enough is enough."""

from __future__ import annotations

import math
from statistics import mean

import numpy as np
import pytest
import torch

from frpo import steering
from frpo.config import FrpoEstimator, GrpoEstimator, LearnerConfig, ObjectiveConfig
from frpo.objective import Groups
from frpo.steering import BETA_RANGE, WINDOW, begin_steering, is_finished, lam_for, next_steering
from frpo.types import Steering

TARGET = 0.5


def steer(state: Steering, kl: float | None, done: float = 1.0, reward: float = 0.0) -> Steering:
    objective = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1, target_kl=TARGET)
    return next_steering(state, objective, lam=None, kl=kl, reward=reward, done=done)


def steered(kl: float | None, steps: int) -> list[Steering]:
    states = [begin_steering(ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1, target_kl=TARGET))]
    for step in range(steps):
        states.append(steer(states[-1], kl, (step + 1) / steps))
    return states


@pytest.mark.parametrize(
    ("kl", "end"), [(0.0, 0.1 / BETA_RANGE), (1e300, 0.1 * BETA_RANGE), (math.inf, 0.1 * BETA_RANGE)]
)
def test_a_kl_that_is_never_reached_takes_beta_to_its_bound_and_no_further(kl: float, end: float) -> None:
    last = steered(kl, 300)[-1]
    assert last.beta == pytest.approx(end)
    assert last.centre == pytest.approx(end)


def test_a_bound_is_ten_thousand_times_what_was_given() -> None:
    assert [steered(kl, 300)[-1].beta for kl in (0.0, 9.0)] == pytest.approx([1e-5, 1e3])


def test_beta_rises_above_its_aim_and_falls_below_it() -> None:
    assert steered(2.0, 1)[1].beta > 0.1
    assert steered(0.0, 1)[1].beta < 0.1
    assert steered(None, 3)[-1].beta == 0.1


def test_a_kl_off_by_its_whole_target_moves_beta_a_little_for_good_and_much_for_one_step() -> None:
    begun = Steering(beta=0.3, centre=0.2, lam=None)
    above = steer(begun, 2 * TARGET)
    assert math.log(above.centre / 0.2) == pytest.approx(0.1)
    assert math.log(above.beta / above.centre) == pytest.approx(2.0)
    back = steer(above, TARGET)
    assert back.beta == back.centre == pytest.approx(above.centre)
    below = steer(begun, TARGET / 2)
    assert math.log(below.centre / 0.2) == pytest.approx(-0.05)
    assert math.log(below.beta / below.centre) == pytest.approx(-1.0)


def test_one_batch_far_off_counts_as_twice_the_target_above_or_as_nothing_below() -> None:
    begun = Steering(beta=0.1, centre=0.1, lam=None)
    assert steer(begun, 100.0) == steer(begun, 3 * TARGET)
    assert math.log(steer(begun, 100.0).centre / 0.1) == pytest.approx(0.2)
    assert steer(begun, -100.0) == steer(begun, 0.0)
    assert math.log(steer(begun, 0.0).centre / 0.1) == pytest.approx(-0.1)


@pytest.mark.parametrize(("done", "aim"), [(0.1, 0.1), (0.25, 0.25), (0.5, 0.5), (0.75, 0.5), (1.0, 0.5)])
def test_the_kl_aimed_at_rises_to_its_target_over_half_the_steps(done: float, aim: float) -> None:
    begun = Steering(beta=0.1, centre=0.1, lam=None)
    assert steer(begun, aim, done).beta == pytest.approx(0.1)
    assert steer(begun, aim + 0.01, done).beta > 0.1
    assert steer(begun, aim - 0.01, done).beta < 0.1


def simulated(steps: int = 200) -> np.ndarray:
    """KLs of a policy with inertia, as shares of the target: the reward pulls it away, beta times its KL
    pulls it back."""
    state = begin_steering(ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1, target_kl=TARGET))
    kls, speed = [0.0], 0.0
    for step in range(steps):
        speed = 0.9 * speed + 0.05 * (0.2 - state.beta * kls[-1])
        kls.append(max(0.0, kls[-1] + speed))
        state = steer(state, kls[-1], (step + 1) / steps)
    return np.array(kls) / TARGET


def test_with_the_reaction_a_policy_ends_at_its_target_and_without_it_swings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm = simulated()
    assert abs(calm[-20:] - 1).max() < 0.2
    assert calm.max() < 1.05
    monkeypatch.setattr(steering, "REACTION", 0.0)
    assert simulated().max() > 1.05


def test_what_is_changed_for_good_finds_a_beta_far_from_the_given_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert simulated()[-20:].mean() == pytest.approx(1, abs=0.05)  # at rest at beta 0.4, given 0.1
    monkeypatch.setattr(steering, "INTEGRAL", 0.0)
    assert simulated()[-20:].mean() > 1.2


RADIUS = FrpoEstimator(rho=0.3)
UNSTEERED = Steering(beta=0.1, centre=0.1, lam=None)


def spread_over(spread: float, *more: float) -> Groups:
    """Rewards whose lam is proportional to their spread; `more` are masked."""
    rewards = torch.tensor([[*(spread * i / 7 for i in range(8)), *more]], dtype=torch.float64)
    mask = torch.tensor([[True] * 8 + [False] * len(more)])
    return Groups.of(rewards, mask)


def test_lam_is_the_given_one_or_in_radius_mode_the_batches_own() -> None:
    state = Steering(beta=0.1, centre=0.1, lam=7.0)
    assert lam_for(spread_over(1.0), FrpoEstimator(lam=0.4), state) == 0.4
    assert lam_for(spread_over(1.0), GrpoEstimator(), state) is None
    own = lam_for(spread_over(1.0), RADIUS, UNSTEERED)
    assert own is not None
    p = torch.softmax(-spread_over(1.0).values / own, dim=1)
    assert float((p * (8 * p).log()).sum()) == pytest.approx(0.3)
    assert lam_for(spread_over(3.0), RADIUS, UNSTEERED) == pytest.approx(3 * own)


def test_a_masked_reward_has_no_say_in_lam() -> None:
    without = lam_for(spread_over(1.0), RADIUS, UNSTEERED)
    assert lam_for(spread_over(1.0, -50.0), RADIUS, UNSTEERED) == pytest.approx(without)


def test_a_batch_moves_lam_a_fifth_of_the_way_in_its_logarithm() -> None:
    own = lam_for(spread_over(1.0), RADIUS, UNSTEERED)
    assert own is not None
    state = Steering(beta=0.1, centre=0.1, lam=own * math.exp(-1))
    moved = lam_for(spread_over(1.0), RADIUS, state)
    assert moved is not None
    assert math.log(moved / own) == pytest.approx(-0.8)


def test_lam_is_remembered_in_radius_mode_alone() -> None:
    state = Steering(beta=0.1, centre=0.1, lam=2.0)
    for estimator, kept in ((RADIUS, 3.0), (FrpoEstimator(lam=3.0), None)):
        objective = ObjectiveConfig(estimator=estimator, beta=0.1)
        assert next_steering(state, objective, lam=3.0, kl=None, reward=0.0, done=1.0).lam == kept


def test_a_run_begins_with_the_given_beta_and_no_lam() -> None:
    assert begin_steering(ObjectiveConfig(estimator=RADIUS, beta=0.3)) == Steering(
        beta=0.3, centre=0.3, lam=None
    )


def test_without_a_target_beta_stays_whatever_the_kl() -> None:
    state = begin_steering(ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1))
    moved = next_steering(
        state, ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1), lam=None, kl=9.0, reward=0.0, done=1.0
    )
    assert (moved.beta, moved.centre) == (0.1, 0.1)


def test_the_last_five_rewards_are_remembered_newest_last() -> None:
    state = Steering(beta=0.1, centre=0.1, lam=None)
    for reward in range(7):
        state = steer(state, None, reward=float(reward))
    assert state.rewards == (2.0, 3.0, 4.0, 5.0, 6.0)


def test_a_stage_ends_at_its_last_step_or_at_the_reward_asked_for() -> None:
    learner = LearnerConfig(num_steps=10, stop_at_reward=0.5)

    def after_rewards(*rewards: float) -> Steering:
        return Steering(beta=0.0, centre=0.0, lam=None, rewards=rewards)

    high = after_rewards(*(0.6,) * WINDOW)
    assert is_finished(high, learner, 5)
    assert not is_finished(high, LearnerConfig(num_steps=10), 5)
    assert not is_finished(after_rewards(*(0.6,) * (WINDOW - 1)), learner, 5)
    assert is_finished(begin_steering(ObjectiveConfig()), learner, 10)
    assert not is_finished(begin_steering(ObjectiveConfig()), learner, 9)
    enough = (0.25, 0.75, 0.5, 0.375, 0.625)
    assert mean(enough) == 0.5
    assert is_finished(after_rewards(*enough), learner, 5)
    assert not is_finished(after_rewards(*enough[:-1], 0.6), learner, 5)
