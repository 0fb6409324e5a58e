"""What a run says of steps that teach little: once per cause and stage."""

from __future__ import annotations

from frpo.advice import advise
from frpo.stats import StepMetrics
from tests.support.builders import metrics

EQUAL = (
    "step 5: all 4 groups had equal rewards for 3 steps: no gradient comes from them; use harder or easier "
    "prompts, a finer reward, "
    "or more completions per group (rollout.group_size)"
)
CUT = (
    "step 2: 63% of the completions are cut at rollout.max_new_tokens = 7: rewards judge unfinished answers; "
    "raise it, give "
    "rollout.stop, or set objective.cut to mask or penalise"
)


def rows(equal: list[float], cut: list[float]) -> list[StepMetrics]:
    return [
        metrics(i + 1, equal_groups=e, cut_share=c) for i, (e, c) in enumerate(zip(equal, cut, strict=True))
    ]


def test_three_steps_in_a_row_with_equal_rewards_are_spoken_of_once() -> None:
    assert advise(rows([1, 1, 1, 1, 1], [0] * 5), 7) == [EQUAL.replace("step 5", "step 3")]
    assert advise(rows([1, 1, 0.99, 1, 1], [0] * 5), 7) == []
    assert advise(rows([1, 0, 1, 1, 1], [0] * 5), 7) == [EQUAL]


def test_more_than_half_of_the_completions_cut_are_spoken_of_once() -> None:
    assert advise(rows([0] * 4, [0.5, 0.63, 0.9, 0.1]), 7) == [CUT]


def test_both_causes_are_told_apart() -> None:
    assert len(advise(rows([1] * 6, [0.8] * 6), 7)) == 2


def test_nothing_is_said_of_steps_that_teach() -> None:
    assert advise(rows([0.9] * 6, [0.5] * 6), 7) == []
    assert advise([], 7) == []
