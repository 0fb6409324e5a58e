"""Beta towards a KL, lam towards a radius, and when enough is enough."""

from __future__ import annotations

import math

import pytest

from frpo.config import GrpoEstimator, LearnerConfig, ObjectiveConfig
from frpo.steering import BETA_RANGE, WINDOW, begin_steering, is_finished, next_steering
from frpo.types import Steering


def steered(kl: float | None, steps: int, beta: float = 0.1) -> list[Steering]:
    objective = ObjectiveConfig(estimator=GrpoEstimator(), beta=beta, target_kl=0.5)
    states = [begin_steering(objective)]
    for step in range(steps):
        states.append(
            next_steering(states[-1], objective, lam=None, kl=kl, reward=0.0, done=(step + 1) / steps)
        )
    return states


@pytest.mark.parametrize(
    ("kl", "end"), [(0.0, 0.1 / BETA_RANGE), (1e300, 0.1 * BETA_RANGE), (math.inf, 0.1 * BETA_RANGE)]
)
def test_a_kl_that_is_never_reached_takes_beta_to_its_bound_and_no_further(kl: float, end: float) -> None:
    last = steered(kl, 5000)[-1]
    assert last.beta == pytest.approx(end)
    assert last.centre == pytest.approx(end)


def test_beta_rises_above_its_aim_and_falls_below_it() -> None:
    assert steered(2.0, 1)[1].beta > 0.1
    assert steered(0.0, 1)[1].beta < 0.1
    assert steered(None, 3)[-1].beta == 0.1


def test_a_stage_ends_at_its_last_step_or_at_the_reward_asked_for() -> None:
    learner = LearnerConfig(num_steps=10, stop_at_reward=0.5)
    high = Steering(beta=0.0, centre=0.0, lam=None, rewards=(0.6,) * WINDOW)
    assert is_finished(high, learner, 5)
    assert not is_finished(high, LearnerConfig(num_steps=10), 5)
    assert not is_finished(
        Steering(beta=0.0, centre=0.0, lam=None, rewards=(0.6,) * (WINDOW - 1)), learner, 5
    )
    assert is_finished(begin_steering(ObjectiveConfig()), learner, 10)
