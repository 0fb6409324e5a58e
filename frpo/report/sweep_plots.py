"""Plots of a sweep's page, in the style of the run's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frpo.report.comparisons import Comparison
from frpo.report.coverage import PolicyOverSeeds
from frpo.report.drawing import INK, PAPER, STYLE, add_legend, colour_of, make_panels, marker_of, write_svg
from frpo.report.intervals import Doubles, Interval
from frpo.report.plots import IN_VIEW, KINDS, count_beyond
from frpo.report.sweep import ArmOverSeeds, Sweep


def draw_trade_off(sweep: Sweep) -> str:
    """Kept reward over KL to the reference, a family of arms a line, a downstream fine-tune a panel."""
    if not sweep.arms[0].kept:
        return ""
    with plt.rc_context(STYLE):
        return write_svg(_plot_trade_off(sweep), "Kept reward over KL")


def draw_differences(sweep: Sweep) -> str:
    """Methods at equal KL: a metric a panel, a pair a row, a KL a point, with its interval and, thin, the
    corrected one."""
    rows = [comparison for comparison in sweep.comparisons if comparison.matched_by == "kl"]
    if not rows:
        return ""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    pairs = list(dict.fromkeys((row.a, row.b) for row in rows))
    several = len({b for _, b in pairs}) > 1
    names = [f"{a}\n− {b}" if several else a for a, b in pairs]
    families = list(dict.fromkeys(arm.family for arm in sweep.arms))
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
            for i, (a, b) in enumerate(pairs):
                mine = [row for row in rows if (row.metric, row.a, row.b) == (metric, a, b)]
                _draw_differences_of_pair(axes, mine, y=i, arm=families.index(a))
            axes.set(title=metric)
            axes.locator_params(axis="x", nbins=3)
        grid[0][0].set_yticks(range(len(pairs)), names)
        grid[0][0].set_ylim(len(pairs) - 0.5, -0.5)
        figure.supxlabel("difference" if several else f"more than {pairs[0][1]}", fontsize=10)
        figure.tight_layout()
        return write_svg(figure, "Differences at equal KL")


def _draw_differences_of_pair(axes: Axes, rows: Sequence[Comparison], *, y: int, arm: int) -> None:
    """Around height y, the smallest KL on top."""
    own = colour_of(arm)
    for i, row in enumerate(sorted(rows, key=lambda row: row.at_kl or 0.0)):
        height = y + 0.2 * (i - (len(rows) - 1) / 2)
        heights = [height, height]
        for lo, hi, width in ((row.corrected_lo, row.corrected_hi, 0.8), (row.lo, row.hi, 2.4)):
            if lo is not None and hi is not None:
                axes.plot([lo, hi], heights, color=own, linewidth=width, solid_capstyle="butt")
        axes.plot([row.difference], [height], color=own, marker=marker_of(arm), markersize=5)


def draw_coverage(sweep: Sweep) -> str:
    """Reward over KL(Q || the arm's policy), means over seeds, an arm a panel: certified, plug-in,
    fine-tunes, attacks."""
    if not any(arm.coverage for arm in sweep.arms):
        return ""
    with plt.rc_context(STYLE):
        return write_svg(_plot_coverage(sweep), "Certificate and measured policies over seeds")


def save_pictures(sweep: Sweep, folder: Path) -> None:
    """The same as PNG: trade_off.png, coverage.png."""
    with plt.rc_context(PAPER):
        if sweep.arms[0].kept:
            _save_png(_plot_trade_off(sweep), folder / "trade_off.png")
        if any(arm.coverage for arm in sweep.arms):
            _save_png(_plot_coverage(sweep), folder / "coverage.png")


def _save_png(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _plot_coverage(sweep: Sweep) -> Figure:
    planes = [(arm.arm, arm.coverage) for arm in sweep.arms if arm.coverage]
    attacked = any(plane.attacks for _, plane in planes)
    figure, grid = make_panels(len(planes), columns=4, width=3.3, height=2.7)
    for axes, (name, plane) in zip(grid.flat, planes, strict=False):
        axes.plot(
            plane.radii,
            plane.plug_in,
            color=colour_of(0),
            linewidth=1.2,
            linestyle="--",
            label="plug-in estimate",
        )
        axes.plot(plane.radii, plane.certified, color=colour_of(0), label="certified")
        most = IN_VIEW * plane.radii[-1]
        for attack, marker, label in KINDS[: 1 + attacked]:
            kind = [policy for policy in plane.policies if policy.attack == attack]
            shown = [policy for policy in kind if policy.kl.mean <= most]
            _draw_policies(axes, shown, colour=colour_of(1 + attack), marker=marker, label=label)
        beyond = count_beyond([policy.kl.mean for policy in plane.policies], plane.radii)
        axes.set(title=name + beyond, xlim=(0, most), ylim=(0, 1.02))
    for axes in grid[-1]:
        axes.set_xlabel("KL(Q || policy), nats")
    for row in grid:
        row[0].set_ylabel(f"reward, {sweep.focus}")
    figure.tight_layout()
    add_legend(grid[0][0])
    return figure


def _draw_policies(
    axes: Axes, policies: Sequence[PolicyOverSeeds], *, colour: str, marker: str, label: str
) -> None:
    axes.errorbar(
        [policy.kl.mean for policy in policies],
        [policy.reward.mean for policy in policies],
        xerr=_bars_of([policy.kl for policy in policies]),
        yerr=_bars_of([policy.reward for policy in policies]),
        color=colour,
        marker=marker,
        markersize=6,
        linestyle="none",
        elinewidth=0.8,
        label=label,
    )


def _bars_of(values: Sequence[Interval]) -> Doubles | None:
    """Lengths of the error bars, down and up, as matplotlib takes them; None where there are no intervals."""
    bars = []
    for value in values:
        if value.lo is not None and value.hi is not None:
            bars.append((value.mean - value.lo, value.hi - value.mean))
    return np.array(bars).T if bars else None


def _plot_trade_off(sweep: Sweep) -> Figure:
    finetunes = list(sweep.arms[0].kept)
    families = list(dict.fromkeys(arm.family for arm in sweep.arms))
    figure, grid = plt.subplots(
        1, len(finetunes), figsize=(4.6 * len(finetunes), 3.6), squeeze=False, sharey=True
    )
    for axes, finetune in zip(grid[0], finetunes, strict=True):
        for i, family in enumerate(families):
            points = [(arm.kl, arm.kept[finetune]) for arm in sweep.arms if arm.family == family]
            measured = [(kl, kept) for kl, kept in points if kl and kept]
            measured.sort(key=lambda point: point[0].mean)
            kls = [kl for kl, _ in measured]
            kept = [reward for _, reward in measured]
            axes.errorbar(
                [kl.mean for kl in kls],
                [reward.mean for reward in kept],
                xerr=_bars_of(kls),
                yerr=_bars_of(kept),
                color=colour_of(i),
                marker=marker_of(i),
                markersize=6,
                elinewidth=0.8,
                linewidth=1.4,
                label=family,
            )
        axes.set(title=f"after {finetune}", xlabel="KL to the reference, nats per completion")
    grid[0][0].set_ylabel(f"kept reward, {sweep.focus} prompts")
    figure.tight_layout()
    add_legend(grid[0][0])
    return figure


def draw_over_lam(sweep: Sweep) -> str:
    """What lambda buys and costs: kept reward, other tasks and KL over it, a weight and kind of penalty a
    line."""
    lines = _lines_over_lam(sweep)
    if not lines:
        return ""
    panels: dict[str, Callable[[ArmOverSeeds], Interval | None]] = {}
    for finetune in sweep.arms[0].kept:
        panels[f"kept after {finetune}"] = partial(_kept_after, finetune)
    panels["other tasks, before"] = lambda arm: arm.others
    panels["KL to the reference, nats"] = lambda arm: arm.kl
    lams = sorted({lam for lam, _ in itertools.chain.from_iterable(lines.values())})
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.1), squeeze=False)
        for axes, (title, value) in zip(grid[0], panels.items(), strict=True):
            for i, key in enumerate(sorted(lines)):
                measured = [(lam, value(arm)) for lam, arm in lines[key]]
                points = [(lam, interval) for lam, interval in measured if interval]
                intervals = [interval for _, interval in points]
                axes.errorbar(
                    [lam for lam, _ in points],
                    [interval.mean for interval in intervals],
                    yerr=_bars_of(intervals),
                    color=colour_of(i),
                    marker=marker_of(i),
                    markersize=5,
                    elinewidth=0.8,
                    linewidth=1.4,
                    label=key[1],
                )
            axes.set(title=title, xlabel="λ, reward units", xscale="log")
            axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axes.minorticks_off()
        figure.tight_layout()
        add_legend(grid[0][0])
        return write_svg(figure, "What lambda buys and costs")


def _lines_over_lam(sweep: Sweep) -> dict[tuple[float, str], list[tuple[float, ArmOverSeeds]]]:
    """The arms of each weight and kind of penalty that have at least two lambdas between them, by lambda."""
    lines: dict[tuple[float, str], list[tuple[float, ArmOverSeeds]]] = {}
    for arm in sweep.arms:
        if arm.lam is not None:
            penalty = arm.settings.partition(", ")[2]
            lines.setdefault((arm.beta, penalty), []).append((arm.lam, arm))
    for line in lines.values():
        line.sort(key=lambda point: point[0])
    return {key: line for key, line in lines.items() if line[0][0] < line[-1][0]}


def _kept_after(finetune: str, arm: ArmOverSeeds) -> Interval | None:
    return arm.kept[finetune]
