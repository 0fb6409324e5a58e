"""Which steps are on the timeline, the exact times of each bar, and the shares."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from benchmarks.timeline import read_timeline
from frpo.report.drawing import PALETTE
from frpo.report.timeline import StepTimes, describe_timeline, share_covered
from frpo.report.timeline_plots import HEIGHT, draw_timeline, plot_timelines, say_shares
from frpo.stats import StepMetrics, Times
from tests.support.builders import metrics


def row(step: int, at: float, *drawn: tuple[float, float], ahead: int = 0) -> StepMetrics:
    """A step that began at `at`: it waits 1 s for groups, 2 for scores, updates for 3 and publishes for 4."""
    made = metrics(step, generate_s=1.0, score_s=2.0, update_s=3.0, publish_s=4.0, step_s=10.0)
    return replace(made, times=Times(at, at + 1, at + 3, at + 6, drawn=drawn, groups_ahead=ahead))


AHEAD = [
    row(1, 0.0, (0.0, 1.0)),
    row(2, 10.0, (1.0, 4.0), (8.0, 11.0), ahead=3),
    row(3, 20.5, (13.0, 15.5), ahead=4),
    row(4, 30.5, (19.0, 31.5), (12.0, 12.5), ahead=1),
]
"""Four groups a step; half a second passes between the second and the third."""


def test_every_bar_has_the_times_that_its_row_says() -> None:
    timeline = describe_timeline("arm", AHEAD, most=2)
    assert timeline is not None
    assert timeline.arm == "arm"
    assert timeline.steps == (  # since the second began
        StepTimes(
            step=2,
            drawn=((-9, -6), (-2, 1)),
            generate=(0, 1),
            score=(1, 3),
            update=(3, 6),
            publish=(6, 10),
        ),
        StepTimes(
            step=3,
            drawn=((3, 5.5),),
            generate=(10.5, 11.5),
            score=(11.5, 13.5),
            update=(13.5, 16.5),
            publish=(16.5, 20.5),
        ),
    )
    assert timeline.ahead_share == (3 + 4) / 8
    # from 10 to 30.5: updates 13 to 16 and 23.5 to 26.5, groups 10 to 11, 12 to 12.5, 13 to 15.5, 19 to 30.5
    assert timeline.update_share == pytest.approx(6 / 20.5)
    assert timeline.drawing_share == pytest.approx((1 + 0.5 + 2.5 + 11.5) / 20.5)


@pytest.mark.parametrize(("count", "shown"), [(1, [1]), (10, list(range(1, 11))), (31, list(range(11, 21)))])
def test_ten_steps_from_the_middle(count: int, shown: list[int]) -> None:
    timeline = describe_timeline("arm", [row(step, 10.0 * step) for step in range(1, count + 1)])
    assert timeline is not None
    assert [step.step for step in timeline.steps] == shown


def test_steps_of_two_clocks_are_not_mixed() -> None:
    """A run that was stopped after step 3, and again after step 8."""
    starts = [0, 10, 20, 0, 10, 20, 30, 40, 5, 15]
    timeline = describe_timeline("arm", [row(step, at, (at, at + 1)) for step, at in enumerate(starts, 1)])
    assert timeline is not None
    assert [step.step for step in timeline.steps] == [4, 5, 6, 7, 8]
    assert timeline.drawing_share == 5 / 50
    assert timeline.update_share == 15 / 50


def test_without_steps_there_is_none() -> None:
    assert describe_timeline("arm", []) is None
    assert draw_timeline(None) == ""


def test_a_share_counts_what_lies_inside_once() -> None:
    assert share_covered((10, 20), [(0, 12), (11, 13), (19, 30), (40, 50)]) == 0.4
    assert share_covered((10, 20), []) == 0


def test_bars_are_drawn_where_they_lie() -> None:
    """(from, to), top and bottom, colour."""
    timeline = describe_timeline("arm", AHEAD, most=2)
    assert timeline is not None
    figure = plot_timelines({"run": timeline})
    bars = []
    for bar in figure.axes[0].collections:
        lies = [path.get_extents() for path in bar.get_paths()]
        spans = [(round(box.x0, 6), round(box.x1, 6)) for box in lies]
        bars.append((spans, (lies[0].y0, lies[0].y1), to_hex(bar.get_facecolor()[0])))
    drawing, score, update, publish, waiting = (PALETTE[number] for number in (0, 1, 2, 3, 7))
    upper, lower = (-HEIGHT, 0.0), (0.0, HEIGHT)
    assert bars[:5] == [
        ([(-9, -6), (-2, 1)], upper, drawing),
        ([(0, 1)], lower, waiting),
        ([(1, 3)], lower, score),
        ([(3, 6)], lower, update),
        ([(6, 10)], lower, publish),
    ]
    assert [spans for spans, _, _ in bars[5:]] == [
        [(3, 5.5)],
        [(10.5, 11.5)],
        [(11.5, 13.5)],
        [(13.5, 16.5)],
        [(16.5, 20.5)],
    ]
    assert [round(top) for _, (top, _), _ in bars[6:]] == [1, 1, 1, 1]
    assert figure.axes[0].get_title() == "run"


def test_the_first_arm_of_a_run_that_is_going_on(tmp_path: Path) -> None:
    stages = ["rlhf/b", "rlhf/a", "rlhf/b"]
    rows = [
        {"kind": "step", "stage": stage, **asdict(each)} for stage, each in zip(stages, AHEAD, strict=False)
    ]
    rows.insert(0, {"kind": "finetune", "stage": "base", "step": 1})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    timeline = read_timeline(tmp_path)
    assert timeline == describe_timeline("b", [AHEAD[0], AHEAD[2]])
    assert say_shares("run", timeline) == (
        "run: the learner updates 20% of the time, groups are being drawn 11%"
    )


def test_a_run_without_a_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{tmp_path} has no step of an arm"):
        read_timeline(tmp_path)
