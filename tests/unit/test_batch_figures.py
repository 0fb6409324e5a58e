"""What is logged of a batch, and what the learner gets, by hand: completions of different lengths, some cut
or failed."""

from __future__ import annotations

import math
from statistics import mean, pstdev

import numpy as np
import pytest

from frpo.batching import flatten, make_batch, means_of
from frpo.config import FrpoEstimator, GrpoEstimator, ObjectiveConfig, RlooEstimator
from frpo.penalties import log_ratios
from frpo.stats import BatchStats
from frpo.types import Completion, Group, Prompt, Reward, ScoredGroup, Steering

GRPO = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.0)


def completion(length: int, token: int, *, cut: bool = False) -> Completion:
    """Tokens token, token + 1, ...; the engine's log-prob of each is -token / 10."""
    ids = np.arange(token, token + length, dtype=np.int32)
    versions = np.full(length, 3, np.int32)
    return Completion(ids, (-ids / 10).astype(np.float32), versions, "", "length" if cut else "stop")


def scored(
    index: int, task: str, completions: list[Completion], rewards: list[Reward], *, asked: bool = True
) -> ScoredGroup:
    """The learner's log-probs are half the engine's, the reference's a quarter."""
    prompt = Prompt(f"p:{index}", "?", np.full(index + 1, 99, np.int32), task, {})
    policy, reference = (tuple(c.logprobs / share for c in completions) for share in (2, 4))
    given = {"policy": policy, "reference": reference} if asked else {"policy": None, "reference": None}
    return ScoredGroup(Group(index, prompt, tuple(completions)), tuple(rewards), **given)


def total(value: float | None, **parts: float | None) -> Reward:
    return Reward(value, parts, None if value is not None else "no judge")


FIRST = scored(
    0,
    "jokes",
    [completion(1, 10), completion(2, 20), completion(6, 30, cut=True)],
    [total(1.0, funny=2.0), total(0.0, funny=0.0), total(0.5, funny=1.0)],
)
SECOND = scored(
    1,
    "sums",
    [completion(3, 40), completion(4, 50, cut=True), completion(5, 60)],
    [total(0.2, right=0.1, short=0.5), total(None, right=None, short=0.8), total(0.6, right=0.3, short=0.2)],
)


def figures(
    objective: ObjectiveConfig = GRPO, groups: tuple[ScoredGroup, ...] = (FIRST, SECOND)
) -> BatchStats:
    return make_batch(groups, objective)[1]


def test_rewards_are_of_all_completions_that_have_one() -> None:
    stats = figures()
    assert stats.reward == pytest.approx(mean([1, 0, 0.5, 0.2, 0.6]))
    assert stats.reward_std == pytest.approx(pstdev([1, 0, 0.5, 0.2, 0.6]))
    assert stats.group_std == pytest.approx(mean([pstdev([1, 0, 0.5]), pstdev([0.2, 0.6])]))
    assert stats.equal_groups == 0
    assert stats.reward_tasks == pytest.approx({"jokes": 0.5, "sums": 0.4})
    assert stats.reward_parts == pytest.approx({"funny": 1.0, "right": 0.2, "short": 0.5})


def test_lengths_and_tokens_are_of_all_completions_drawn() -> None:
    stats = figures()
    assert stats.length == pytest.approx(21 / 6)
    assert stats.cut_share == pytest.approx(2 / 6)
    assert (stats.num_prompts, stats.num_completions, stats.num_tokens) == (2, 6, 21)
    assert (stats.failed_rewards, stats.dropped_groups, stats.errors) == (1, 0, ("no judge",))


def test_the_spread_of_advantages_is_of_what_trains() -> None:
    assert figures().advantage_std == pytest.approx(pstdev([0.5, -0.5, 0, -0.2, 0.2]))
    masked = figures(GRPO.model_copy(update={"cut": "mask"}))
    assert masked.advantage_std == pytest.approx(pstdev([0.5, -0.5, -0.2, 0.2]))
    assert masked.reward == pytest.approx(mean([1, 0, 0.5, 0.2, 0.6]))  # whatever trains


def test_tilt_is_that_of_the_temperature_in_use() -> None:
    stats = figures(ObjectiveConfig(estimator=FrpoEstimator(lam=0.25), beta=0.0))

    def tilt(*rewards: float) -> tuple[float, float]:
        weights = [math.exp(-r / 0.25) for r in rewards]
        p = [w / sum(weights) for w in weights]
        return sum(x * math.log(x * len(p)) for x in p), 1 / sum(x * x for x in p)

    both = tilt(1, 0, 0.5), tilt(0.2, 0.6)
    assert stats.lam == 0.25
    assert stats.radius == pytest.approx(mean(radius for radius, _ in both))
    assert stats.effective_samples == pytest.approx(mean(effective for _, effective in both))
    plain = figures()
    assert (plain.lam, plain.radius, plain.effective_samples) == (None, None, None)


def test_in_radius_mode_the_temperature_is_the_batches_own_smoothed_with_the_one_before() -> None:
    objective = ObjectiveConfig(estimator=FrpoEstimator(rho=0.2), beta=0.0)
    first = figures(objective)
    assert first.radius == pytest.approx(0.2, abs=1e-6)
    assert first.lam is not None
    _, later = make_batch(
        (FIRST, SECOND), objective, Steering(beta=0.0, centre=0.0, lam=first.lam * math.exp(-1))
    )
    assert later.lam == pytest.approx(first.lam * math.exp(-0.8))
    assert later.radius is not None
    assert later.radius > 0.2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_batch_without_any_reward_has_no_mean_and_no_spread() -> None:
    nothing = scored(0, "jokes", [completion(2, 5), completion(4, 7)], [total(None), total(None)])
    stats = figures(ObjectiveConfig(estimator=FrpoEstimator(lam=0.25), beta=0.0), (nothing,))
    assert math.isnan(stats.reward)
    assert (stats.reward_std, stats.group_std, stats.advantage_std, stats.non_monotone) == (0, 0, 0, 0)
    assert (stats.equal_groups, stats.dropped_groups, stats.failed_rewards) == (1, 1, 2)
    assert (stats.radius, stats.effective_samples, stats.length) == (None, None, 3)
    batch, _ = make_batch((nothing,), GRPO)
    assert batch.old is not None
    arrays = (batch.sequences.tokens, batch.advantages, batch.behaviour, batch.old)
    assert [(len(array), array.dtype.name) for array in arrays] == [(0, "int32"), *[(0, "float32")] * 3]


def test_flat_sequences_are_32_bit_also_of_wider_ids() -> None:
    sequences = flatten([(np.array([1, 2]), np.array([3]))])
    given = (sequences.tokens, sequences.prompt_lengths, sequences.lengths)
    assert [(array.tolist(), array.dtype.name) for array in given] == [
        ([1, 2, 3], "int32"),
        ([2], "int32"),
        ([3], "int32"),
    ]


def test_groups_with_equal_rewards_are_those_without_any_spread() -> None:
    drawn = [completion(1, 5), completion(1, 6), completion(1, 7)]
    equal = scored(2, "jokes", drawn, [total(0.3), total(0.3 + 1e-12), total(0.3)])
    assert figures(groups=(FIRST, SECOND, equal)).equal_groups == pytest.approx(1 / 3)


def test_the_batch_holds_the_tokens_and_log_probs_of_what_trains_one_after_the_other() -> None:
    batch, _ = make_batch(
        (SECOND, FIRST), ObjectiveConfig(estimator=GrpoEstimator(), beta=0.25, penalty="k3")
    )
    sequences = batch.sequences
    assert sequences.prompt_lengths.tolist() == [1, 1, 1, 2, 2]
    assert (sequences.lengths - sequences.prompt_lengths).tolist() == [1, 2, 6, 3, 5]
    ids = [10, *range(20, 22), *range(30, 36), *range(40, 43), *range(60, 65)]
    behaviour = np.array(ids) / -10
    np.testing.assert_allclose(batch.behaviour, behaviour, rtol=1e-6)
    assert batch.old is not None
    assert batch.reference is not None
    np.testing.assert_allclose(batch.old, behaviour / 2, rtol=1e-6)
    np.testing.assert_allclose(batch.reference, behaviour / 4, rtol=1e-6)
    np.testing.assert_allclose(batch.advantages, [0.5, -0.5, 0, -0.2, 0.2], atol=1e-7)
    assert {a.dtype for a in (batch.behaviour, batch.old, batch.reference, batch.advantages)} == {
        np.dtype(np.float32)
    }
    assert batch.betas.tolist() == [0.25] * 5


def test_what_was_not_asked_for_is_not_in_the_batch() -> None:
    plain = scored(0, "jokes", [completion(1, 10), completion(2, 20)], [total(1.0), total(0.0)], asked=False)
    batch, _ = make_batch((plain,), GRPO)
    assert (batch.old, batch.reference) == (None, None)


def test_log_ratios_add_up_the_tokens_of_each_completion() -> None:
    short = scored(0, "jokes", [completion(1, 10), completion(3, 20)], [total(1.0), total(0.0)])
    ratios = log_ratios([short])  # policy - reference = -token / 40
    assert ratios is not None
    np.testing.assert_allclose(ratios, [[-10 / 40, -63 / 40]], rtol=1e-6)
    unasked = scored(0, "jokes", [completion(1, 10)], [total(1.0)], asked=False)
    assert log_ratios([unasked]) is None


def test_the_reverse_penalty_is_of_the_weight_in_use_and_only_where_it_is_chosen() -> None:
    steering = Steering(beta=1.0, centre=0.1, lam=None)
    reverse = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1, penalty="reverse")
    batch, stats = make_batch((SECOND,), reverse, steering)
    kl = [-123 / 40, -310 / 40]  # of the two that train
    own = np.array([-0.2, 0.2])
    np.testing.assert_allclose(batch.advantages, own - (np.array(kl) - mean(kl)), rtol=1e-5)
    assert stats.beta == 1.0
    for other in (reverse.model_copy(update={"penalty": "k3"}), reverse):
        weight = 1.0 if other.penalty == "k3" else 0.0
        batch, _ = make_batch((SECOND,), other, Steering(beta=weight, centre=0.1, lam=None))
        np.testing.assert_allclose(batch.advantages, own, atol=1e-7)


def test_each_method_has_its_own_advantages() -> None:
    def advantages(estimator: FrpoEstimator | GrpoEstimator | RlooEstimator) -> list[float]:
        return make_batch((FIRST,), ObjectiveConfig(estimator=estimator, beta=0.0))[0].advantages.tolist()

    rewards = [1.0, 0.0, 0.5]
    spread = (0.5**2 + 0.5**2) / 2
    assert advantages(GrpoEstimator(normalize_std=False)) == pytest.approx([0.5, -0.5, 0])
    assert advantages(GrpoEstimator(normalize_std=True)) == pytest.approx(
        [0.5 / spread**0.5, -0.5 / spread**0.5, 0], rel=1e-5
    )
    assert advantages(RlooEstimator()) == pytest.approx([1 - 0.25, 0 - 0.75, 0], abs=1e-7)

    def share(rewards: list[float], lam: float) -> list[float]:
        weights = [math.exp(-r / lam) for r in rewards]
        return [w / sum(weights) for w in weights]

    plug_in = share(rewards, 0.5)
    assert advantages(FrpoEstimator(lam=0.5, jackknife=False, scale="exact")) == pytest.approx(
        [0.5 * (1 - 3 * p) for p in plug_in], abs=1e-6
    )
    without = [share([r for i, r in enumerate(rewards) if i != j], 0.5) for j in range(3)]
    others = [without[1][0] + without[2][0], without[0][0] + without[2][1], without[0][1] + without[1][1]]
    weights = [3 * p - 2 / 3 * rest for p, rest in zip(plug_in, others, strict=True)]
    assert advantages(FrpoEstimator(lam=0.5, jackknife=True, scale="unit")) == pytest.approx(
        [1 - 3 * w for w in weights], abs=1e-6
    )


def test_means_by_name_are_sorted_and_leave_out_what_has_no_value() -> None:
    found = means_of([("b", 1.0), ("a", 0.0), ("b", None), ("c", None), ("b", 4.0)])
    assert list(found.items()) == [("a", 0.0), ("b", 2.5)]
