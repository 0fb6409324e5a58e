"""The frontier as a picture: kept reward over what was learned."""

from __future__ import annotations

import matplotlib.pyplot as plt

from frpo.report.plots import STYLE, add_legend, colour_of, marker_of, write_svg
from frpo.report.schema import Report


def draw_frontier(report: Report) -> str:
    """A point for each arm and fine-tune with held-out examples: the arm is its colour, the fine-tune its
    mark; bar = 95 % over prompts. Empty where there is none."""
    if not report.frontier:
        return ""
    arms = [arm.name for arm in report.arms]
    finetunes = list(dict.fromkeys(point.downstream for point in report.frontier))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 3.6))
        for point in report.frontier:
            axes.errorbar(
                [point.learned],
                [point.kept.mean],
                yerr=[point.kept.half or 0.0],
                color=colour_of(arms.index(point.arm)),
                marker=marker_of(finetunes.index(point.downstream)),
                markersize=7,
                elinewidth=0.7,
                linestyle="none",
                label=f"{point.arm}, {point.downstream}",
            )
        axes.set(
            xlabel="learned: held-out downstream loss, before - after, nats per token",
            ylabel=f"kept: reward, {report.focus} prompts",
        )
        figure.tight_layout()
        add_legend(axes, columns=2)
        return write_svg(figure, "What was kept over what was learned")
