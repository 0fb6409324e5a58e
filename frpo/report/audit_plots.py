"""The plane of an audit: what was certified, and where the fine-tunes lie."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from frpo.report.audit_schema import Audit, FineTuned, name_models
from frpo.report.drawing import INK, STYLE, add_legend, colour_of, make_panels, write_svg
from frpo.report.plots import draw_curves
from frpo.report.spread import Spread

AROUND = 1.08
"""Axes end so far beyond the farthest point."""


def draw_audits(audits: Sequence[Audit]) -> str:
    """Reward over KL(Q || model), a model a panel: certified, plug-in, fine-tunes that count, and others."""
    with plt.rc_context(STYLE):
        width = 7.6 if len(audits) == 1 else 5.2
        figure, grid = make_panels(len(audits), columns=2, width=width, height=3.6)
        names = name_models(audits)
        for number, (axes, audit) in enumerate(zip(grid.flat, audits, strict=False)):
            draw_curves(axes, audit.certificate, colour_of(number))
            _draw_fine_tunes(axes, audit, number)
            axes.set(title=names[number], xlabel="KL(Q || model), nats per completion")
        grid[0][0].set_xlim(0, AROUND * max(map(_find_farthest, audits)))
        for row in grid:
            row[0].set_ylabel(f"reward, {audits[0].task} prompts")
        figure.tight_layout()
        add_legend(grid[0][0])
        return write_svg(figure, "Certificate and fine-tunes")


def _find_farthest(audit: Audit) -> float:
    """KL of the fine-tune, or radius of the certificate, that is farthest away, nats."""
    return max([audit.certificate.radii[-1], *(fine_tune.kl.mean for fine_tune in audit.fine_tunes)])


def _draw_fine_tunes(axes: Axes, audit: Audit, number: int) -> None:
    own = colour_of(number)
    useful = [fine_tune for fine_tune in audit.fine_tunes if fine_tune.counts]
    others = [fine_tune for fine_tune in audit.fine_tunes if not fine_tune.counts]
    _draw_points(axes, useful, colour=own, face=own, label="useful fine-tunes")
    _draw_points(axes, others, colour=own, face="none", label="other fine-tunes")
    if audit.harshest:
        point = ([audit.harshest.kl.mean], [audit.harshest.kept.mean])
        axes.scatter(*point, s=150, facecolors="none", edgecolors=INK, linewidths=1.4, label="the worst")


def _draw_points(axes: Axes, fine_tunes: Sequence[FineTuned], *, colour: str, face: str, label: str) -> None:
    if not fine_tunes:
        return
    axes.errorbar(
        [each.kl.mean for each in fine_tunes],
        [each.kept.mean for each in fine_tunes],
        xerr=_bars_of([each.kl for each in fine_tunes]),
        yerr=_bars_of([each.kept for each in fine_tunes]),
        color=colour,
        markerfacecolor=face,
        marker="o",
        markersize=5,
        linestyle="none",
        elinewidth=0.8,
        label=label,
    )


def _bars_of(spreads: Sequence[Spread]) -> list[list[float]]:
    """Down and up; no length without an interval."""
    down = [spread.mean - (spread.mean if spread.lo is None else spread.lo) for spread in spreads]
    up = [(spread.mean if spread.hi is None else spread.hi) - spread.mean for spread in spreads]
    return [down, up]
