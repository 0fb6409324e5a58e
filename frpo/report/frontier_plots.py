"""The frontier as a picture: kept reward over what was learned."""

from __future__ import annotations

from matplotlib.lines import Line2D

from frpo.report.drawing import INK, Panel, colour_of, mark, marker_of, panel
from frpo.report.schema import Report


def draw_frontier(report: Report) -> list[Panel]:
    """A point for each arm and fine-tune with held-out examples: the arm is its colour, the fine-tune its
    mark; bar = 95 % over prompts."""
    panels: list[Panel] = []
    arms = [arm.name for arm in report.arms]
    finetunes = list(dict.fromkeys(point.downstream for point in report.frontier))
    if not finetunes:
        return panels
    with panel(panels, "frontier", f"reward on {report.focus} prompts, over what was learned") as axes:
        for point in report.frontier:
            i = arms.index(point.arm)
            drawn = axes.errorbar(
                [point.learned],
                [point.kept.mean],
                yerr=[point.kept.half or 0.0],
                color=colour_of(i),
                marker=marker_of(finetunes.index(point.downstream)),
                markersize=7,
                elinewidth=0.7,
            )
            words = f"{point.arm}, {point.downstream}: learned {point.learned:.3f}, kept {point.kept:.2f}"
            mark((drawn[0], *drawn[2]), i, words)
        kinds = [
            Line2D([], [], color=INK, marker=marker_of(i), linestyle="none", label=finetune)
            for i, finetune in enumerate(finetunes)
        ]
        axes.legend(handles=kinds, fontsize=9)
        axes.set(xlabel="learned, nats per token", ylabel="reward kept")
    return panels
