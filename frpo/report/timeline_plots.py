"""The timeline as a picture: on the page of a run, or of several runs one above the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frpo.report.drawing import PAPER, STYLE, add_legend, colour_of, mark, save_png, write_svg
from frpo.report.timeline import Timeline

DRAWING = (0, "drawing its groups")
"""Number of the colour, words."""
PHASES = {
    "generate": (7, "waiting for groups"),
    "score": (1, "waiting for scores"),
    "update": (2, "learner updates"),
    "publish": (3, "publishing weights"),
}
HEIGHT = 0.38
"""Of a bar, steps."""


def draw_timeline(timeline: Timeline | None) -> str:
    if timeline is None:
        return ""
    with plt.rc_context(STYLE):
        return write_svg(plot_timelines({"": timeline}, width=4.6, columns=2), "What a step waits for")


def save_timelines(timelines: Mapping[str, Timeline], file: Path) -> None:
    """As PNG, on one axis of time; by title."""
    with plt.rc_context(PAPER):
        figure = plot_timelines({say_shares(name, line): line for name, line in timelines.items()})
        save_png(figure, file)


def say_shares(name: str, timeline: Timeline) -> str:
    return (
        f"{name}: the learner updates {timeline.update_share:.0%} of the time, "
        f"groups are being drawn {timeline.drawing_share:.0%}"
    )


def plot_timelines(timelines: Mapping[str, Timeline], width: float = 8.6, columns: int = 5) -> Figure:
    """One above the other, by title; width in inches, columns of the legend."""
    heights = [0.34 * len(timeline.steps) for timeline in timelines.values()]
    figure, grid = plt.subplots(
        len(timelines),
        1,
        figsize=(width, sum(heights) + 0.7 * len(timelines)),
        squeeze=False,
        sharex=True,
        height_ratios=heights,
    )
    for axes, (title, timeline) in zip(grid[:, 0], timelines.items(), strict=True):
        _plot_steps(axes, timeline)
        axes.set(title=title, ylabel="step")
    grid[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    add_legend(grid[0, 0], columns=columns)
    return figure


def _plot_steps(axes: Axes, timeline: Timeline) -> None:
    """Two bars a step: above, while its groups were being drawn; below, its phases."""
    for row, step in enumerate(timeline.steps):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color=plt.rcParams["grid.color"], alpha=0.4, linewidth=0)
        bars = [(row - HEIGHT, step.drawn, *DRAWING)]
        bars += [(row, (getattr(step, phase),), *look) for phase, look in PHASES.items()]
        for top, spans, colour, words in bars:
            widths = [(began, ended - began) for began, ended in spans]
            label = words if row == 0 else None
            bar = axes.broken_barh(
                widths, (top, HEIGHT), facecolors=colour_of(colour), linewidth=0, label=label
            )
            mark(bar, None, f"step {step.step}, {words}: {sum(width for _, width in widths):.2f} s")
    axes.set_yticks(range(len(timeline.steps)), [str(step.step) for step in timeline.steps])
    axes.set_ylim(len(timeline.steps) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.01)
    axes.grid(axis="y", visible=False)
