"""Plots of a sweep's page, in the style of the run's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frpo.report.comparisons import Comparison
from frpo.report.coverage import Coverage, PolicyOverSeeds
from frpo.report.drawing import (
    INK,
    PAPER,
    Panel,
    add_legend,
    colour_of,
    make_panels,
    mark,
    mark_value,
    marker_of,
    panel,
    save_png,
)
from frpo.report.intervals import Doubles, Interval
from frpo.report.plots import IN_VIEW, KINDS, count_beyond
from frpo.report.sweep import ArmOverSeeds, Sweep

WIDE = 50
"""Letters of a line above a difference."""


def draw_trade_off(sweep: Sweep) -> list[Panel]:
    """Kept reward over KL to the reference, a family of arms a line, a downstream fine-tune a panel."""
    panels: list[Panel] = []
    for finetune in sweep.arms[0].kept:
        with panel(panels, "kept", f"after {finetune}") as axes:
            _draw_trade_off(axes, sweep, finetune)
            axes.set(
                ylim=_limits_of(sweep), xlabel="KL to the reference, nats", ylabel=f"kept, {sweep.focus}"
            )
    return panels


def _limits_of(sweep: Sweep) -> tuple[float, float]:
    """Of kept reward, so that all fine-tunes can be compared."""
    every = itertools.chain.from_iterable(arm.kept.values() for arm in sweep.arms)
    kept = [each.mean for each in every if each]
    return min(kept) - 0.05, max(kept) + 0.05


def families_of(sweep: Sweep) -> list[str]:
    """In the order of their arms: the order of their colours."""
    return list(dict.fromkeys(arm.family for arm in sweep.arms))


def draw_differences(sweep: Sweep) -> list[Panel]:
    """Methods at equal KL: a metric a panel, a pair a row, a KL a point, with its interval and, thin, the
    corrected one."""
    rows = [comparison for comparison in sweep.comparisons if comparison.matched_by == "kl"]
    pairs = list(dict.fromkeys((row.a, row.b) for row in rows))
    families = families_of(sweep)
    panels: list[Panel] = []
    for metric in dict.fromkeys(row.metric for row in rows):
        with panel(panels, "difference", metric, height=0.6 + 0.95 * len(pairs)) as axes:
            mark(axes.axvline(0, color=INK, linewidth=0.8), None, "no difference")
            for i, (a, b) in enumerate(pairs):
                mine = [row for row in rows if (row.metric, row.a, row.b) == (metric, a, b)]
                _draw_differences_of_pair(axes, mine, y=i, arm=families.index(a))
                words = fill(f"{a} − {b}", WIDE)
                axes.text(0, i - 0.05, words, transform=axes.get_yaxis_transform(), fontsize=7.5, va="bottom")
            axes.set(yticks=[], ylim=(len(pairs) - 0.5, -0.55), xlabel="difference of reward")
            axes.locator_params(axis="x", nbins=4)
    return panels


def _draw_differences_of_pair(axes: Axes, rows: Sequence[Comparison], *, y: int, arm: int) -> None:
    """Below height y, the smallest KL on top."""
    own = colour_of(arm)
    for i, row in enumerate(sorted(rows, key=lambda row: row.at_kl or 0.0)):
        height = y + 0.08 + 0.12 * i
        heights = [height, height]
        pair = f"{row.a} − {row.b} at {row.at_kl:.2f} nats"
        intervals = (
            ("corrected", row.corrected_lo, row.corrected_hi, 0.8),
            ("95 %", row.lo, row.hi, 2.4),
        )
        for name, lo, hi, width in intervals:
            if lo is not None and hi is not None:
                line = axes.plot([lo, hi], heights, color=own, linewidth=width, solid_capstyle="butt")
                mark(line, arm, f"{pair}, {name}: [{lo:+.3f}, {hi:+.3f}]")
        point = axes.plot([row.difference], [height], marker_of(arm), color=own, markersize=5)
        mark(point, arm, f"{pair}: {row.interval:+.3f}, {row.num_seeds} seeds")


def draw_coverage(sweep: Sweep) -> list[Panel]:
    """Reward over KL(Q || the arm's policy), means over seeds, an arm a panel: certified, plug-in,
    fine-tunes, attacks."""
    panels: list[Panel] = []
    for arm in sweep.arms:
        if arm.coverage:
            with panel(panels, "coverage", _title_of(arm.arm, arm.coverage)) as axes:
                _draw_coverage(axes, arm.coverage)
                axes.set(xlabel="KL from the arm's policy, nats", ylabel=f"reward, {sweep.focus}")
    return panels


def save_pictures(sweep: Sweep, folder: Path) -> None:
    """The same as PNG: trade_off.png, coverage.png."""
    with plt.rc_context(PAPER):
        if sweep.arms[0].kept:
            save_png(_plot_trade_off(sweep), folder / "trade_off.png")
        if any(arm.coverage for arm in sweep.arms):
            save_png(_plot_coverage(sweep), folder / "coverage.png")


def _plot_coverage(sweep: Sweep) -> Figure:
    planes = [(arm.arm, arm.coverage) for arm in sweep.arms if arm.coverage]
    figure, grid = make_panels(len(planes), columns=4, width=3.3, height=2.7)
    for axes, (name, plane) in zip(grid.flat, planes, strict=False):
        _draw_coverage(axes, plane)
        axes.set(title=_title_of(name, plane))
    for axes in grid[-1]:
        axes.set_xlabel("KL(Q || policy), nats")
    for row in grid:
        row[0].set_ylabel(f"reward, {sweep.focus}")
    figure.tight_layout()
    add_legend(grid[0][0])
    return figure


def _title_of(arm: str, plane: Coverage) -> str:
    return arm + count_beyond([policy.kl.mean for policy in plane.policies], plane.radii)


def _draw_coverage(axes: Axes, plane: Coverage) -> None:
    own = colour_of(0)
    axes.plot(plane.radii, plane.plug_in, color=own, linewidth=1.2, linestyle="--", label="plug-in estimate")
    axes.plot(plane.radii, plane.certified, color=own, label="certified")
    most = IN_VIEW * plane.radii[-1]
    for attack, marker, label in KINDS[: 1 + any(policy.attack for policy in plane.policies)]:
        kind = [policy for policy in plane.policies if policy.attack == attack]
        shown = [policy for policy in kind if policy.kl.mean <= most]
        _draw_policies(axes, shown, colour=colour_of(1 + attack), marker=marker, label=label)
    axes.set(xlim=(0, most), ylim=(0, 1.02))


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
    for policy in policies:
        kl, reward = policy.kl, policy.reward
        mark_value(axes, kl.mean, reward.mean, None, f"{label}: reward {reward:z.2f} at {kl:z.2f} nats")


def _bars_of(values: Sequence[Interval]) -> Doubles | None:
    """Lengths of the error bars, down and up, as matplotlib takes them; None where there are no intervals."""
    bars = []
    for value in values:
        if value.lo is not None and value.hi is not None:
            bars.append((value.mean - value.lo, value.hi - value.mean))
    return np.array(bars).T if bars else None


def _plot_trade_off(sweep: Sweep) -> Figure:
    finetunes = list(sweep.arms[0].kept)
    figure, grid = plt.subplots(
        1, len(finetunes), figsize=(4.6 * len(finetunes), 3.6), squeeze=False, sharey=True
    )
    for axes, finetune in zip(grid[0], finetunes, strict=True):
        _draw_trade_off(axes, sweep, finetune)
        axes.set(title=f"after {finetune}", xlabel="KL to the reference, nats per completion")
    grid[0][0].set_ylabel(f"kept reward, {sweep.focus} prompts")
    figure.tight_layout()
    add_legend(grid[0][0])
    return figure


def _draw_trade_off(axes: Axes, sweep: Sweep, finetune: str) -> None:
    for i, family in enumerate(families_of(sweep)):
        arms = [arm for arm in sweep.arms if arm.family == family and arm.kl and arm.kept[finetune]]
        points = [(arm.arm, arm.kl, kept) for arm in arms if arm.kl and (kept := arm.kept[finetune])]
        points.sort(key=lambda point: point[1].mean)
        line = axes.errorbar(
            [kl.mean for _, kl, _ in points],
            [kept.mean for _, _, kept in points],
            xerr=_bars_of([kl for _, kl, _ in points]),
            yerr=_bars_of([kept for _, _, kept in points]),
            color=colour_of(i),
            marker=marker_of(i),
            markersize=6,
            elinewidth=0.8,
            linewidth=1.4,
            label=family,
        )
        mark((line[0], *line[2]), i, family)
        for arm, kl, kept in points:
            mark_value(axes, kl.mean, kept.mean, i, f"{arm}: kept {kept:.2f} at {kl:.2f} nats")


def draw_over_lam(sweep: Sweep) -> list[Panel]:
    """What lambda buys and costs: kept reward, other tasks and KL over it, a weight and kind of penalty a
    line."""
    lines = _lines_over_lam(sweep)
    if not lines:
        return []
    values: dict[str, Callable[[ArmOverSeeds], Interval | None]] = {}
    for finetune in sweep.arms[0].kept:
        values[f"kept after {finetune}"] = partial(_kept_after, finetune)
    values["other tasks, before"] = lambda arm: arm.others
    values["KL to the reference, nats"] = lambda arm: arm.kl
    lams = sorted({lam for lam, _ in itertools.chain.from_iterable(lines.values())})
    drawn: list[Panel] = []
    for title, value in values.items():
        with panel(drawn, "lambda", title) as axes:
            for i, key in enumerate(sorted(lines)):
                name = f"{key[1]}, β {key[0]:g}"
                _draw_line_over_lam(axes, i, name, [(lam, value(arm)) for lam, arm in lines[key]])
            axes.set(xlabel="λ, reward units", xscale="log")
            axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axes.minorticks_off()
    return drawn


def _draw_line_over_lam(
    axes: Axes, i: int, name: str, measured: Sequence[tuple[float, Interval | None]]
) -> None:
    points = [(lam, interval) for lam, interval in measured if interval]
    intervals = [interval for _, interval in points]
    line = axes.errorbar(
        [lam for lam, _ in points],
        [interval.mean for interval in intervals],
        yerr=_bars_of(intervals),
        color=colour_of(i),
        marker=marker_of(i),
        markersize=5,
        elinewidth=0.8,
        linewidth=1.4,
    )
    mark((line[0], *line[2]), None, name)
    for lam, interval in points:
        mark_value(axes, lam, interval.mean, None, f"{name}, λ {lam:g}: {interval:z.2f}")


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
