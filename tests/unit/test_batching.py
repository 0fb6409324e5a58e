"""Scored groups -> batch: who trains, with what advantage, in which order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from frpo.batching import blocks_of, flatten, make_batch, reasons_of
from frpo.config import FrpoEstimator, GrpoEstimator, ObjectiveConfig
from frpo.types import Completion, Group, Prompt, Reward, ScoredGroup


def group(
    index: int,
    rewards: list[float | None],
    *,
    cut: tuple[int, ...] = (),
    gap: float = 0.0,
    reference: bool = True,
) -> ScoredGroup:
    """k completions of 2 tokens; completion j has log-probs -0.1 j, 0.01 more by the engine, and the
    reference's are `gap * j` lower."""
    prompt = Prompt(
        f"p:{index}",
        f"prompt {index}",
        np.array([1, 10 + index], np.int32),
        "even" if index % 2 == 0 else "odd",
        {},
    )
    logprobs = [np.full(2, -0.1 * j, np.float32) for j in range(len(rewards))]
    completions = tuple(
        Completion(
            np.array([100 * index + j, 2], np.int32),
            lp + np.float32(0.01),
            np.zeros(2, np.int32),
            f"c{j}",
            "length" if j in cut else "stop",
        )
        for j, lp in enumerate(logprobs)
    )
    scores = tuple(Reward(r, {"a": r}, None if r is not None else f"broke at {index}") for r in rewards)
    refs = tuple((lp - gap * j).astype(np.float32) for j, lp in enumerate(logprobs)) if reference else None
    return ScoredGroup(Group(index, prompt, completions), scores, refs, tuple(logprobs))


GRPO = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.0)


def test_order_is_by_prompt_index_not_by_arrival() -> None:
    groups = [group(2, [1.0, 0.0]), group(0, [0.0, 1.0]), group(1, [0.5, 0.0])]
    batch, _ = make_batch(groups, GRPO)
    assert [int(t) for t in batch.sequences.tokens.reshape(6, 4)[:, 2]] == [0, 1, 100, 101, 200, 201]
    np.testing.assert_allclose(batch.advantages, [-0.5, 0.5, 0.25, -0.25, 0.5, -0.5])
    assert batch.fresh.tolist() == [True] * 6
    other, _ = make_batch(groups[::-1], GRPO)
    np.testing.assert_array_equal(other.sequences.tokens, batch.sequences.tokens)


def test_a_failed_reward_is_never_zero() -> None:
    batch, stats = make_batch([group(0, [1.0, None, 0.5]), group(1, [None, 1.0, None])], GRPO)
    assert len(batch.sequences) == 2
    np.testing.assert_allclose(batch.advantages, [0.25, -0.25])  # as 0 it would have been [0.5, -0.5, 0]
    assert (stats.failed_rewards, stats.dropped_groups, stats.num_completions) == (3, 1, 6)
    assert stats.reward == pytest.approx((1 + 0.5 + 1) / 3)
    assert stats.errors == ("broke at 0", "broke at 1")
    assert stats.reward_tasks == pytest.approx({"even": 0.75, "odd": 1.0})


@pytest.mark.parametrize(
    ("cut", "advantages"),
    [("keep", [0.5, -0.5, 0.0]), ("mask", [0.5, -0.5]), ("penalise", [2 / 3, -1 / 3, -1 / 3])],
)
def test_cut_completions(cut: str, advantages: list[float]) -> None:
    config = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.0, cut=cut, cut_penalty=0.5)  # type: ignore[arg-type]
    batch, stats = make_batch([group(0, [1.0, 0.0, 0.5], cut=(2,))], config)
    np.testing.assert_allclose(batch.advantages, advantages, atol=1e-7)
    assert stats.cut_share == pytest.approx(1 / 3)
    assert stats.reward == pytest.approx(0.5)  # the metric is the reward as given


def test_reverse_penalty_lowers_what_the_policy_favours_beyond_the_reference() -> None:
    scored = [group(0, [0.5, 0.5, 0.5], gap=1.0)]  # D = 0, 2, 4 nats
    batch, _ = make_batch(scored, ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1, penalty="reverse"))
    np.testing.assert_allclose(
        batch.advantages, [0.2, 0.0, -0.2], atol=1e-6
    )  # of the learner's log-probs, not the engine's
    assert batch.old is not None
    assert batch.reference is not None
    assert float((batch.old - batch.reference).sum()) == pytest.approx(6.0)
    np.testing.assert_allclose(batch.behaviour - batch.old, 0.01, atol=1e-6)


def test_k3_keeps_the_reference_for_the_loss_and_leaves_advantages_alone() -> None:
    scored = [group(0, [0.5, 0.5, 0.5], gap=1.0)]
    batch, _ = make_batch(
        [replace(s, policy=None) for s in scored],
        ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1, penalty="k3"),
    )
    np.testing.assert_array_equal(batch.advantages, np.zeros(3, np.float32))
    assert batch.reference is not None
    np.testing.assert_allclose(batch.reference, [0, 0, -1.1, -1.1, -2.2, -2.2], atol=1e-6)
    assert batch.old is None


def test_without_a_reference_there_is_none_in_the_batch() -> None:
    batch, _ = make_batch([group(0, [0.0, 1.0], reference=False)], GRPO)
    assert batch.reference is None


def test_blocks_hold_neighbours_up_to_the_budget_and_every_group_once() -> None:
    groups = [
        group(i, [0.0] * k).group for i, k in enumerate((1, 2, 3, 9, 1, 1))
    ]  # of 4, 8, 12, 36, 4 and 4 tokens
    assert [[g.index for g in block] for block in blocks_of(groups, 16)] == [[0, 1], [2], [3], [4, 5]]
    assert [[g.index for g in block] for block in blocks_of(groups[:3], 24)] == [[0, 1, 2]]
    assert blocks_of([], 16) == []


def test_equal_groups_and_non_monotone_are_counted() -> None:
    groups = [group(0, [1.0, 1.0, 1.0, 1.0]), group(1, [0.0, 0.3, 0.9, 1.0])]
    _, stats = make_batch(groups, ObjectiveConfig(estimator=FrpoEstimator(lam=0.02), beta=0.0))
    assert stats.equal_groups == 0.5
    assert stats.non_monotone == 0.5


def test_non_monotone_is_of_the_methods_advantages_alone() -> None:
    scored = [group(0, [0.0, 0.5, 1.0], gap=1.0)]  # the penalty turns the order around
    batch, stats = make_batch(
        scored, ObjectiveConfig(estimator=GrpoEstimator(), beta=10.0, penalty="reverse")
    )
    assert batch.advantages[0] > batch.advantages[2]
    assert stats.non_monotone == 0.0


def test_a_task_or_part_without_a_value_is_left_out() -> None:
    _, stats = make_batch([group(0, [1.0, 0.5]), group(1, [None, None])], GRPO)
    assert stats.reward_tasks == {"even": 0.75}
    assert (stats.dropped_groups, stats.num_prompts) == (1, 2)


def test_reasons_are_told_once_and_not_at_length() -> None:
    errors = ["a" * 1000, None, "a" * 1000, "b", "c", "d"]
    assert reasons_of(errors) == ("a" * 300, "b", "c")


def test_flatten() -> None:
    sequences = flatten(
        [
            (np.array([1, 2], np.int32), np.array([3], np.int32)),
            (np.array([4], np.int32), np.array([5, 6], np.int32)),
        ]
    )
    assert sequences.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert (sequences.lengths.tolist(), sequences.prompt_lengths.tolist()) == ([3, 3], [2, 1])
    assert sequences.num_completion_tokens == 3
    assert sequences.tokens.dtype == np.int32
    assert len(flatten([])) == 0


def test_a_completion_is_fresh_where_the_policy_that_is_updated_drew_all_of_its_group() -> None:
    """Not where an older one began another completion of it, whose prompt they share."""
    old, mixed, new = (group(index, [1.0, 0.0]) for index in range(3))

    def drawn_by(scored: ScoredGroup, *versions: tuple[int, int]) -> ScoredGroup:
        completions = [
            replace(completion, versions=np.array(tokens, np.int32))
            for completion, tokens in zip(scored.group.completions, versions, strict=True)
        ]
        return replace(scored, group=replace(scored.group, completions=tuple(completions)))

    drawn = [drawn_by(old, (3, 3), (3, 4)), drawn_by(mixed, (3, 4), (4, 4)), drawn_by(new, (4, 4), (4, 4))]
    batch, stats = make_batch(drawn, GRPO, version=4)
    assert batch.fresh.tolist() == [False, False, False, False, True, True]
    assert stats.staleness == pytest.approx(4 / 12)
    assert stats.max_staleness == 1
