"""Ten steps on one axis of time: what a step waits for, and what goes on meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from frpo.clock import Span, merge_spans
from frpo.records import Record
from frpo.stats import StepMetrics


class StepTimes(Record):
    """(from, to), seconds since the first step of the timeline began."""

    step: int
    drawn: tuple[Span, ...]
    """While groups that it trains on were being drawn; below 0 before the first step began."""
    generate: Span
    """It waited for groups."""
    score: Span
    """It waited for their scores."""
    update: Span
    publish: Span


class Timeline(Record):
    """Steps that follow one another, from the middle of an arm's rlhf stage."""

    arm: str
    steps: tuple[StepTimes, ...]
    update_share: float
    """Share of the time from the first one's begin to the last one's end in which the learner updated."""
    drawing_share: float
    """The same in which groups were being drawn, for these steps or later ones."""
    ahead_share: float
    """Share of their groups that were there when their step began."""


def describe_timeline(arm: str, rows: Sequence[StepMetrics], most: int = 10) -> Timeline | None:
    """`rows` are the steps of a stage; None for none. At most `most` are kept."""
    if not rows:
        return None
    stretch = max(split_at_resumes(rows), key=len)
    first = max(0, (len(stretch) - most) // 2)
    shown = stretch[first : first + most]
    whole = (shown[0].times.generate_at, _step_times(shown[-1], 0.0).publish[1])
    return Timeline(
        arm=arm,
        steps=tuple(_step_times(row, whole[0]) for row in shown),
        update_share=share_covered(whole, [_step_times(row, 0.0).update for row in shown]),
        drawing_share=share_covered(whole, chain.from_iterable(row.times.drawn for row in stretch)),
        ahead_share=sum(row.times.groups_ahead for row in shown)
        / sum(row.batch.num_prompts for row in shown),
    )


def split_at_resumes(rows: Sequence[StepMetrics]) -> list[list[StepMetrics]]:
    """Steps of one loop each, which have one clock: that of a resumed loop is behind again."""
    stretches: list[list[StepMetrics]] = []
    for row in rows:
        if not stretches or row.times.generate_at < stretches[-1][-1].times.publish_at:
            stretches.append([])
        stretches[-1].append(row)
    return stretches


def _step_times(row: StepMetrics, origin: float) -> StepTimes:
    times, phases = row.times, row.phases

    def span(began: float, seconds: float) -> Span:
        return began - origin, began - origin + seconds

    return StepTimes(
        step=row.step,
        drawn=tuple((began - origin, ended - origin) for began, ended in times.drawn),
        generate=span(times.generate_at, phases.generate_s),
        score=span(times.score_at, phases.score_s),
        update=span(times.update_at, phases.update_s),
        publish=span(times.publish_at, phases.publish_s),
    )


def share_covered(whole: Span, spans: Iterable[Span]) -> float:
    """Share of `whole` in which at least one of `spans` lies."""
    began, ended = whole
    inside = [min(last, ended) - max(first, began) for first, last in merge_spans(spans)]
    return sum(seconds for seconds in inside if seconds > 0) / (ended - began)
