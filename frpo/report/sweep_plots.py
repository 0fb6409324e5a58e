"""Plots of a sweep's page, in the style of the run's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from frpo.report.bootstrap import Interval
from frpo.report.plots import INK, KINDS, MARKERS, PAPER, STYLE, colour, legend, panels, svg
from frpo.report.sweep import ArmOverSeeds, Sweep


def trade_off(found: Sweep) -> str:
    """Kept reward over KL to the reference, a family of arms a line, a downstream fine-tune a panel."""
    if not found.arms[0].kept:
        return ""
    with plt.rc_context(STYLE):
        return svg(_trade_off(found), "Kept reward over KL")


def differences(found: Sweep) -> str:
    """Methods at equal KL: a metric a panel, a pair a row, a KL a point, with its interval and, thin, the
    corrected one."""
    rows = [c for c in found.comparisons if c.matched_by == "kl"]
    if not rows:
        return ""
    metrics, pairs = (
        list(dict.fromkeys(c.metric for c in rows)),
        list(dict.fromkeys((c.a, c.b) for c in rows)),
    )
    several = len({b for _, b in pairs}) > 1
    names = [f"{a}\n− {b}" if several else a for a, b in pairs]
    families = list(dict.fromkeys(a.family for a in found.arms))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1,
            len(metrics),
            figsize=(1.6 + 2.1 * len(metrics), 1.1 + 0.62 * len(pairs)),
            squeeze=False,
            sharey=True,
        )
        for axes, metric in zip(grid[0], metrics, strict=True):
            axes.axvline(0, color=INK, linewidth=0.8)
            for i, pair in enumerate(pairs):
                mine = sorted(
                    (c for c in rows if (c.metric, c.a, c.b) == (metric, *pair)), key=lambda c: c.at_kl or 0.0
                )
                own = families.index(pair[0])
                for j, c in enumerate(mine):
                    y = i + 0.2 * (j - (len(mine) - 1) / 2)
                    axes.plot([c.corrected_lo, c.corrected_hi], [y, y], color=colour(own), linewidth=0.8)
                    axes.plot([c.lo, c.hi], [y, y], color=colour(own), linewidth=2.4, solid_capstyle="butt")
                    axes.plot([c.difference], [y], color=colour(own), marker=MARKERS[own % 8], markersize=5)
            axes.set(title=metric)
            axes.locator_params(axis="x", nbins=3)
        grid[0][0].set_yticks(range(len(pairs)), names)
        grid[0][0].set_ylim(len(pairs) - 0.5, -0.5)
        figure.supxlabel("difference" if several else f"more than {pairs[0][1]}", fontsize=10)
        figure.tight_layout()
        return svg(figure, "Differences at equal KL")


def coverage(found: Sweep) -> str:
    """Reward over KL(Q || the arm's policy), means over seeds, an arm a panel: certified, plug-in,
    fine-tunes, attacks."""
    if not any(a.coverage for a in found.arms):
        return ""
    with plt.rc_context(STYLE):
        return svg(_coverage(found), "Certificate and measured policies over seeds")


def pictures(found: Sweep, folder: Path) -> None:
    """The same as PNG: trade_off.png, coverage.png."""
    with plt.rc_context(PAPER):
        covered = any(a.coverage for a in found.arms)
        for name, there, draw in (
            ("trade_off", found.arms[0].kept, _trade_off),
            ("coverage", covered, _coverage),
        ):
            if there:
                figure = draw(found)
                figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
                plt.close(figure)


def _coverage(found: Sweep) -> Figure:
    mine = [(a.arm, a.coverage) for a in found.arms if a.coverage]
    figure, grid = panels(len(mine), columns=4, width=3.3, height=2.7)
    for axes, (name, c) in zip(grid.flat, mine, strict=False):
        axes.plot(
            c.radii, c.plug_in, color=colour(0), linewidth=1.2, linestyle="--", label="plug-in estimate"
        )
        axes.plot(c.radii, c.certified, color=colour(0), label="certified")
        for attack, marker, label in KINDS[: 1 + any(c.attacks for _, c in mine)]:
            shown = [p for p in c.policies if p.attack == attack and p.kl.mean <= 1.1 * c.radii[-1]]
            axes.errorbar(
                [p.kl.mean for p in shown],
                [p.reward.mean for p in shown],
                xerr=_bars([p.kl for p in shown]),
                yerr=_bars([p.reward for p in shown]),
                color=colour(1 + attack),
                marker=marker,
                markersize=6,
                linestyle="none",
                elinewidth=0.8,
                label=label,
            )
        beyond = sum(p.kl.mean > 1.1 * c.radii[-1] for p in c.policies)
        axes.set(
            title=name + (f" ({beyond} further out)" if beyond else ""),
            xlim=(0, 1.1 * c.radii[-1]),
            ylim=(0, 1.02),
        )
    for axes in grid[-1]:
        axes.set_xlabel("KL(Q || policy), nats")
    for row in grid:
        row[0].set_ylabel(f"reward, {found.focus}")
    figure.tight_layout()
    legend(grid[0][0])
    return figure


def _bars(values: Sequence[Interval]) -> list[list[float]]:
    return [[v.mean - v.lo for v in values], [v.hi - v.mean for v in values]]


def _trade_off(found: Sweep) -> Figure:
    finetunes = list(found.arms[0].kept)
    families = list(dict.fromkeys(a.family for a in found.arms))
    figure, grid = plt.subplots(
        1, len(finetunes), figsize=(4.6 * len(finetunes), 3.6), squeeze=False, sharey=True
    )
    for axes, finetune in zip(grid[0], finetunes, strict=True):
        for i, family in enumerate(families):
            points = [(a.kl, a.kept[finetune]) for a in found.arms if a.family == family]
            both = sorted(((k, v) for k, v in points if k and v), key=lambda p: p[0].mean)
            x, y = [k for k, _ in both], [v for _, v in both]
            axes.errorbar(
                [v.mean for v in x],
                [v.mean for v in y],
                xerr=_bars(x),
                yerr=_bars(y),
                color=colour(i),
                marker=MARKERS[i % 8],
                markersize=6,
                elinewidth=0.8,
                linewidth=1.4,
                label=family,
            )
        axes.set(title=f"after {finetune}", xlabel="KL to the reference, nats per completion")
    grid[0][0].set_ylabel(f"kept reward, {found.focus} prompts")
    figure.tight_layout()
    legend(grid[0][0])
    return figure


def over_lam(found: Sweep) -> str:
    """What lambda buys and costs: kept reward, other tasks and KL over it, a weight and kind of penalty a
    line."""
    lines: dict[tuple[float, str], list[ArmOverSeeds]] = {}
    for a in found.arms:
        if a.lam is not None:
            lines.setdefault((a.beta, a.settings.partition(", ")[2]), []).append(a)
    lines = {
        key: sorted(arms, key=lambda a: a.lam or 0.0)
        for key, arms in lines.items()
        if len({a.lam for a in arms}) >= 2
    }
    if not lines:
        return ""
    shown: list[tuple[str, Callable[[ArmOverSeeds], Interval | None]]] = [
        *((f"kept after {f}", partial(_kept_after, f)) for f in found.arms[0].kept),
        ("other tasks, before", lambda a: a.others),
        ("KL to the reference, nats", lambda a: a.kl),
    ]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.1), squeeze=False)
        for axes, (title, value) in zip(grid[0], shown, strict=True):
            for i, ((_, label), arms) in enumerate(sorted(lines.items())):
                points = [(a.lam, v) for a in arms if (v := value(a))]
                axes.errorbar(
                    [x for x, _ in points],
                    [v.mean for _, v in points],
                    yerr=_bars([v for _, v in points]),
                    color=colour(i),
                    marker=MARKERS[i % 8],
                    markersize=5,
                    elinewidth=0.8,
                    linewidth=1.4,
                    label=label,
                )
            axes.set(title=title, xlabel="λ, reward units", xscale="log")
            lams = sorted({a.lam for arms in lines.values() for a in arms if a.lam is not None})
            axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axes.minorticks_off()
        figure.tight_layout()
        legend(grid[0][0])
        return svg(figure, "What lambda buys and costs")


def _kept_after(finetune: str, arm: ArmOverSeeds) -> Interval | None:
    return arm.kept[finetune]
