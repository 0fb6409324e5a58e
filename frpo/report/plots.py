"""Plots of the report as inline SVG. Text stays text, colours are CSS variables, so one drawing serves light
and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frpo.records import Certificate
from frpo.report.schema import Report, reward_of

INK, GRID = "#010203", "#010204"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "frpo",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.transparent": True,
}
PAPER: Any = STYLE | {
    "text.color": "black", "axes.labelcolor": "black", "xtick.color": "black", "ytick.color": "black", "axes.edgecolor": "0.8",
    "grid.color": "0.9", "savefig.transparent": False,
}  # fmt: skip
"""For pictures that stand alone."""
PALETTE = ("#2563c9", "#d2620a", "#18875a", "#8a4fc7", "#b3335f", "#7a6a00", "#0f7f8c", "#6b7280")
NUM_COLOURS = len(PALETTE)
KINDS = ((False, "o", "fine-tunes"), (True, "X", "attacks"))
"""Of measured policies: whether an attack, marker, name."""
MARKERS = "osD^vPX*"


def colour(index: int) -> str:
    """Of an arm: on a page the placeholder of its CSS variable, on paper the colour itself."""
    number = index % NUM_COLOURS
    return f"#0a0b{number:02x}" if plt.rcParams["text.color"] == INK else PALETTE[number]


def svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    for i in range(NUM_COLOURS):
        text = text.replace(f"#0a0b{i:02x}", f"var(--arm-{i})")
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{title}" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
    # identifiers of several drawings on one page must differ
    tag = re.sub(r"\W+", "-", title.lower())
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{tag}-", text)


def panels(count: int, *, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """`count` panels with common axes, at most `columns` a row; width and height of one in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharex=True, sharey=True
    )
    for spare in grid.flat[count:]:
        spare.set_visible(False)
    return figure, grid


def legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(labels))
        )


def downstream(report: Report) -> str:
    """Reward of each rlhf task through each downstream fine-tune, an arm a curve, band = 95 % over
    prompts."""
    finetunes = sorted({d.task for d in report.downstream})
    if not finetunes or not report.tasks:
        return ""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(report.tasks),
            len(finetunes),
            figsize=(4.1 * len(finetunes), 2.7 * len(report.tasks)),
            squeeze=False,
            sharey=True,
        )
        for row, task in zip(grid, report.tasks, strict=True):
            for axes, finetune in zip(row, finetunes, strict=True):
                for i, arm in enumerate(report.arms):
                    run = next(
                        (d for d in report.downstream if (d.arm, d.task) == (arm.name, finetune)), None
                    )
                    points = (
                        [(e.step, r) for e in run.evaluations if (r := reward_of(e, task))] if run else []
                    )
                    x, y = [s for s, _ in points], [r.mean for _, r in points]
                    low, high = ([r.mean + sign * (r.half or 0.0) for _, r in points] for sign in (-1, 1))
                    axes.plot(x, y, color=colour(i), marker=MARKERS[i % 8], markersize=5, label=arm.name)
                    axes.fill_between(x, low, high, color=colour(i), alpha=0.15, linewidth=0)
                axes.set(title=f"{task} prompts, {finetune}", xlabel="downstream steps")
            row[0].set_ylabel("mean reward")
        figure.tight_layout()
        legend(grid[0][0])
        return svg(figure, "Reward through downstream fine-tuning")


def plane(report: Report) -> str:
    """Every measured policy: its KL to the reference, and the reward on the task that lost most."""
    if report.focus is None:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 3.6))
        for i, arm in enumerate(report.arms):
            for run in (d for d in report.downstream if d.arm == arm.name):
                points = [(e.kl_reference, reward_of(e, report.focus)) for e in run.evaluations]
                xy = [(k.mean, r.mean) for k, r in points if k and r]
                axes.plot([x for x, _ in xy], [y for _, y in xy], color=colour(i), alpha=0.45, linewidth=1.2)
                axes.scatter([x for x, _ in xy[1:]], [y for _, y in xy[1:]], color=colour(i), s=14)
            start, reward = arm.evaluation.kl_reference, reward_of(arm.evaluation, report.focus)
            if start and reward:
                axes.scatter(
                    [start.mean],
                    [reward.mean],
                    color=colour(i),
                    s=70,
                    marker=MARKERS[i % 8],
                    label=f"{arm.name}, before",
                    zorder=3,
                )
        if report.zero_line is not None:
            axes.axvspan(
                -report.zero_line,
                report.zero_line,
                color="grey",
                alpha=0.3,
                linewidth=0.8,
                label="a policy against itself",
            )
        axes.set(xlabel="KL to the reference, nats per completion", ylabel=f"reward, {report.focus} prompts")
        figure.tight_layout()
        legend(axes)
        return svg(figure, "Reward over KL to the reference")


def certificate(report: Report) -> str:
    """Reward over KL(Q || the arm's policy) on the focus task, an arm a panel: certified, plug-in,
    fine-tunes, attacks."""
    mine = [r for r in report.robustness if r.task == report.focus]
    if not mine:
        return ""
    with plt.rc_context(STYLE):
        figure, grid = panels(len(mine), columns=3, width=4.1, height=3.2)
        for i, (axes, r) in enumerate(zip(grid.flat, mine, strict=False)):
            names = [a.name for a in report.arms]
            own = colour(names.index(r.arm))
            axes.plot(
                r.radii,
                r.plug_in,
                color=own,
                linewidth=1.2,
                linestyle="--",
                label="plug-in estimate" if i == 0 else None,
            )
            axes.fill_between(r.radii, r.lo, r.hi, color=own, alpha=0.15, linewidth=0)
            axes.plot(r.radii, r.certified, color=own, label="certified" if i == 0 else None)
            for attack, marker, label in KINDS[: 1 + any(p.attack for r in mine for p in r.points)]:
                points = [p for p in r.points if p.attack == attack and p.kl.mean <= 1.1 * r.radii[-1]]
                axes.errorbar(
                    [p.kl.mean for p in points],
                    [p.reward.mean for p in points],
                    xerr=[p.kl.half or 0.0 for p in points],
                    yerr=[p.reward.half or 0.0 for p in points],
                    color=own,
                    marker=marker,
                    markersize=6,
                    linestyle="none",
                    elinewidth=0.7,
                    label=label if i == 0 else None,
                )
            beyond = sum(p.kl.mean > 1.1 * r.radii[-1] for p in r.points)
            if r.radius is not None:
                axes.axvline(r.radius, color=GRID, linewidth=1.4)
            title = r.arm if r.radius is None else f"{r.arm}, trained for {r.radius:.2f} nats"
            axes.set(
                title=title + (f" ({beyond} further out)" if beyond else ""), xlim=(0, 1.1 * r.radii[-1])
            )
        for axes in grid[-1]:
            axes.set_xlabel("KL(Q || policy), nats per completion")
        for row in grid:
            row[0].set_ylabel(f"reward, {report.focus} prompts")
        figure.tight_layout()
        legend(grid[0][0])
        return svg(figure, "Certificate and measured policies")


def certificates(found: Sequence[Certificate], file: Path) -> None:
    """A picture of certificates without a run: certified and plug-in, a task a panel."""
    with plt.rc_context(PAPER):
        figure, grid = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.6), squeeze=False)
        for axes, c in zip(grid[0], found, strict=True):
            axes.plot(
                c.radii, c.plug_in, color=colour(0), linewidth=1.2, linestyle="--", label="plug-in estimate"
            )
            axes.fill_between(c.radii, c.lo, c.hi, color=colour(0), alpha=0.15, linewidth=0)
            axes.plot(c.radii, c.certified, color=colour(0), label=f"certified, {c.confidence:.0%}")
            axes.set(
                title=f"{c.task}: {len(c.rewards)} prompts x {len(c.rewards[0])}",
                xlabel="KL radius, nats per completion",
                ylabel="reward",
            )
            axes.legend()
        figure.tight_layout()
        figure.savefig(file, dpi=130)
        plt.close(figure)


def training(report: Report) -> str:
    """Reward, KL, entropy and length over the steps of the rlhf stage."""
    names = (
        ("reward", "reward"),
        ("kl", "KL to reference, nats"),
        ("entropy", "entropy, nats"),
        ("length", "length, tokens"),
    )
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(8.2, 4.8))
        for axes, (name, title) in zip(grid.flat, names, strict=True):
            for i, curve in enumerate(report.training):
                pairs = [
                    (s, v) for s, v in zip(curve.steps, getattr(curve, name), strict=True) if v is not None
                ]
                values = _smooth([v for _, v in pairs])
                axes.plot([s for s, _ in pairs], values, color=colour(i), label=curve.arm, linewidth=1.6)
            axes.set(title=title)
        for axes in grid[1]:
            axes.set_xlabel("steps")
        figure.tight_layout()
        legend(grid[0][0])
        return svg(figure, "Training")


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Trailing mean over `width` steps."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def phases(report: Report) -> str:
    """Seconds per step of each phase, an arm a bar."""
    names = ("generate", "score", "update", "publish", "other")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(report.arms) + 1.1))
        left = [0.0] * len(report.arms)
        for i, name in enumerate(names):
            widths = [
                a.summary.phase_seconds.get(name, 0.0) / max(1, a.summary.num_steps) for a in report.arms
            ]
            axes.barh(
                [a.name for a in report.arms], widths, left=left, color=colour(i), label=name, height=0.6
            )
            left = [x + w for x, w in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds per step")
        figure.tight_layout()
        legend(axes)
        return svg(figure, "Where the time went")
