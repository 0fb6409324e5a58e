"""The plane of an audit: what was certified, and where the fine-tunes lie."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from frpo.report.audit_schema import Audit, FineTuned, tell_models_apart
from frpo.report.drawing import INK, Panel, colour_of, mark, panel
from frpo.report.plots import draw_curves
from frpo.report.spread import Spread

AROUND = 1.08
"""Axes end so far beyond the farthest point."""
TALL = 2.7
"""Inches."""


def draw_audits(audits: Sequence[Audit]) -> list[Panel]:
    """Reward over KL(Q || model), a model a panel: certified, plug-in, fine-tunes that count, and others."""
    panels: list[Panel] = []
    farthest = AROUND * max(map(_find_farthest, audits))
    highest = AROUND * max(map(_find_highest, audits))
    for number, (name, audit) in enumerate(zip(tell_models_apart(audits), audits, strict=True)):
        with panel(panels, "audit", name, height=TALL) as axes:
            draw_curves(axes, audit.certificate, colour_of(number))
            _draw_fine_tunes(axes, audit, number)
            axes.set(xlim=(0, farthest), ylim=(-0.03 * highest, highest))
            axes.set(
                xlabel="KL from the model, nats per completion", ylabel=f"reward, {audits[0].task} prompts"
            )
    return panels


def _find_farthest(audit: Audit) -> float:
    """KL of the fine-tune, or radius of the certificate, that is farthest away, nats."""
    return max([audit.certificate.radii[-1], *(fine_tune.kl.mean for fine_tune in audit.fine_tunes)])


def _find_highest(audit: Audit) -> float:
    """Reward of what is drawn."""
    kept = [fine_tune.kept for fine_tune in audit.fine_tunes]
    return max([*audit.certificate.hi, *(max(each.mean, each.hi or 0.0) for each in kept)])


def _draw_fine_tunes(axes: Axes, audit: Audit, number: int) -> None:
    for fine_tune in audit.fine_tunes:
        _draw_point(axes, fine_tune, colour_of(number))
    if audit.harshest:
        point = ([audit.harshest.kl.mean], [audit.harshest.kept.mean])
        ring = axes.scatter(*point, s=150, facecolors="none", edgecolors=INK, linewidths=1.4)
        mark(ring, None, "the worst of the useful")


def _draw_point(axes: Axes, fine_tune: FineTuned, colour: str) -> None:
    """Filled for one that counts."""
    drawn = axes.errorbar(
        [fine_tune.kl.mean],
        [fine_tune.kept.mean],
        xerr=_bar_of(fine_tune.kl),
        yerr=_bar_of(fine_tune.kept),
        color=colour,
        markerfacecolor=colour if fine_tune.counts else "none",
        marker="o",
        markersize=5,
        elinewidth=0.8,
    )
    words = f"{fine_tune.name}: kept {fine_tune.kept:z.2f} at {fine_tune.kl:z.2f} nats"
    mark((drawn[0], *drawn[2]), None, words)


def _bar_of(spread: Spread) -> list[list[float]]:
    """Down and up; no length without an interval."""
    low = spread.mean if spread.lo is None else spread.lo
    high = spread.mean if spread.hi is None else spread.hi
    return [[spread.mean - low], [high - spread.mean]]
