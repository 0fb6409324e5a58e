"""Plots of the report as inline SVG. Text stays text, colours are CSS variables, so one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frpo.records import Certificate
from frpo.report.bootstrap import Interval
from frpo.report.data import Report, reward_of
from frpo.report.sweep import ArmOverSeeds, Sweep

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
MARKERS = "osD^vPX*"


def colour(index: int) -> str:
    """Of an arm: on a page the placeholder of its CSS variable, on paper the colour itself."""
    number = index % NUM_COLOURS
    return f"#0a0b{number:02x}" if plt.rcParams["text.color"] == INK else PALETTE[number]


def _svg(figure: Figure, title: str) -> str:
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


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(labels)))


def downstream(report: Report) -> str:
    """Reward of each rlhf task through each downstream fine-tune, an arm a curve, band = 95 % over prompts."""
    finetunes = sorted({d.task for d in report.downstream})
    if not finetunes or not report.tasks:
        return ""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(report.tasks), len(finetunes), figsize=(4.1 * len(finetunes), 2.7 * len(report.tasks)), squeeze=False, sharey=True
        )
        for row, task in zip(grid, report.tasks, strict=True):
            for axes, finetune in zip(row, finetunes, strict=True):
                for i, arm in enumerate(report.arms):
                    run = next((d for d in report.downstream if (d.arm, d.task) == (arm.name, finetune)), None)
                    points = [(e.step, r) for e in run.evaluations if (r := reward_of(e, task))] if run else []
                    x, y = [s for s, _ in points], [r.mean for _, r in points]
                    low, high = ([r.mean + sign * 1.96 * r.se for _, r in points] for sign in (-1, 1))
                    axes.plot(x, y, color=colour(i), marker=MARKERS[i % 8], markersize=5, label=arm.name)
                    axes.fill_between(x, low, high, color=colour(i), alpha=0.15, linewidth=0)
                axes.set(title=f"{task} prompts, {finetune}", xlabel="downstream steps")
            row[0].set_ylabel("mean reward")
        figure.tight_layout()
        _legend(grid[0][0])
        return _svg(figure, "Reward through downstream fine-tuning")


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
                    [start.mean], [reward.mean], color=colour(i), s=70, marker=MARKERS[i % 8], label=f"{arm.name}, before", zorder=3
                )
        axes.set(xlabel="KL to the reference, nats per completion", ylabel=f"reward, {report.focus} prompts")
        figure.tight_layout()
        _legend(axes)
        return _svg(figure, "Reward over KL to the reference")


def certificate(report: Report) -> str:
    """Reward over KL(Q || the arm's policy) on the focus task, an arm a panel: certified, plug-in, fine-tunes, attacks."""
    mine = [r for r in report.robustness if r.task == report.focus]
    if not mine:
        return ""
    columns = min(3, len(mine))
    rows = -(-len(mine) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(rows, columns, figsize=(4.1 * columns, 3.2 * rows), squeeze=False, sharex=True, sharey=True)
        for spare in grid.flat[len(mine) :]:
            spare.set_visible(False)
        for i, (axes, r) in enumerate(zip(grid.flat, mine, strict=False)):
            names = [a.name for a in report.arms]
            own = colour(names.index(r.arm))
            axes.plot(r.radii, r.plug_in, color=own, linewidth=1.2, linestyle="--", label="plug-in estimate" if i == 0 else None)
            axes.fill_between(r.radii, r.lo, r.hi, color=own, alpha=0.15, linewidth=0)
            axes.plot(r.radii, r.certified, color=own, label="certified" if i == 0 else None)
            for attack, marker, label in ((False, "o", "fine-tunes"), (True, "X", "attacks")):
                points = [p for p in r.points if p.attack == attack and p.kl.mean <= 1.1 * r.radii[-1]]
                axes.errorbar(
                    [p.kl.mean for p in points], [p.reward.mean for p in points], xerr=[1.96 * p.kl.se for p in points],
                    yerr=[1.96 * p.reward.se for p in points], color=own, marker=marker, markersize=6, linestyle="none", elinewidth=0.7,
                    label=label if i == 0 else None,
                )  # fmt: skip
            beyond = sum(p.kl.mean > 1.1 * r.radii[-1] for p in r.points)
            if r.radius is not None:
                axes.axvline(r.radius, color=GRID, linewidth=1.4)
            title = r.arm if r.radius is None else f"{r.arm}, trained for {r.radius:.2f} nats"
            axes.set(title=title + (f" ({beyond} further out)" if beyond else ""), xlim=(0, 1.1 * r.radii[-1]))
        for axes in grid[-1]:
            axes.set_xlabel("KL(Q || policy), nats per completion")
        for row in grid:
            row[0].set_ylabel(f"reward, {report.focus} prompts")
        figure.tight_layout()
        _legend(grid[0][0])
        return _svg(figure, "Certificate and measured policies")


def certificates(found: Sequence[Certificate], file: Path) -> None:
    """A picture of certificates without a run: certified and plug-in, a task a panel."""
    with plt.rc_context(PAPER):
        figure, grid = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.6), squeeze=False)
        for axes, c in zip(grid[0], found, strict=True):
            axes.plot(c.radii, c.plug_in, color=colour(0), linewidth=1.2, linestyle="--", label="plug-in estimate")
            axes.fill_between(c.radii, c.lo, c.hi, color=colour(0), alpha=0.15, linewidth=0)
            axes.plot(c.radii, c.certified, color=colour(0), label=f"certified, {c.confidence:.0%}")
            axes.set(
                title=f"{c.task}: {len(c.rewards)} prompts x {len(c.rewards[0])}", xlabel="KL radius, nats per completion", ylabel="reward"
            )
            axes.legend()
        figure.tight_layout()
        figure.savefig(file, dpi=130)
        plt.close(figure)


def trade_off(found: Sweep) -> str:
    """Kept reward over KL to the reference, a family of arms a line, a downstream fine-tune a panel."""
    if not found.arms[0].kept:
        return ""
    with plt.rc_context(STYLE):
        return _svg(_trade_off(found), "Kept reward over KL")


def differences(found: Sweep) -> str:
    """Methods at equal KL: a metric a panel, a pair a row, a KL a point, with its interval and, thin, the corrected one."""
    rows = [c for c in found.comparisons if c.matched_by == "kl"]
    if not rows:
        return ""
    metrics, pairs = list(dict.fromkeys(c.metric for c in rows)), list(dict.fromkeys((c.a, c.b) for c in rows))
    several = len({b for _, b in pairs}) > 1
    names = [f"{a}\n− {b}" if several else a for a, b in pairs]
    families = list(dict.fromkeys(a.family for a in found.arms))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(metrics), figsize=(1.6 + 2.1 * len(metrics), 1.1 + 0.62 * len(pairs)), squeeze=False, sharey=True
        )
        for axes, metric in zip(grid[0], metrics, strict=True):
            axes.axvline(0, color=INK, linewidth=0.8)
            for i, pair in enumerate(pairs):
                mine = sorted((c for c in rows if (c.metric, c.a, c.b) == (metric, *pair)), key=lambda c: c.at_kl or 0.0)
                own = families.index(pair[0])
                for j, c in enumerate(mine):
                    y = i + 0.2 * (j - (len(mine) - 1) / 2)
                    axes.plot([c.corrected_lo, c.corrected_hi], [y, y], color=colour(own), linewidth=0.8)
                    axes.plot([c.lo, c.hi], [y, y], color=colour(own), linewidth=2.4, solid_capstyle="butt")
                    axes.plot([c.difference], [y], color=colour(own), marker=MARKERS[own % 8], markersize=5)
            axes.set(title=metric)
            axes.locator_params(axis="x", nbins=4)
        grid[0][0].set_yticks(range(len(pairs)), names)
        grid[0][0].set_ylim(len(pairs) - 0.5, -0.5)
        figure.supxlabel("difference" if several else f"more than {pairs[0][1]}", fontsize=10)
        figure.tight_layout()
        return _svg(figure, "Differences at equal KL")


def coverage(found: Sweep) -> str:
    """Reward over KL(Q || the arm's policy), means over seeds, an arm a panel: certified, plug-in, fine-tunes, attacks."""
    if not any(a.coverage for a in found.arms):
        return ""
    with plt.rc_context(STYLE):
        return _svg(_coverage(found), "Certificate and measured policies over seeds")


def pictures(found: Sweep, folder: Path) -> None:
    """The same as PNG: trade_off.png, coverage.png."""
    with plt.rc_context(PAPER):
        covered = any(a.coverage for a in found.arms)
        for name, there, draw in (("trade_off", found.arms[0].kept, _trade_off), ("coverage", covered, _coverage)):
            if there:
                figure = draw(found)
                figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
                plt.close(figure)


def _coverage(found: Sweep) -> Figure:
    mine = [(a.arm, a.coverage) for a in found.arms if a.coverage]
    columns = min(4, len(mine))
    rows = -(-len(mine) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.3 * columns, 2.7 * rows), squeeze=False, sharex=True, sharey=True)
    for spare in grid.flat[len(mine) :]:
        spare.set_visible(False)
    for axes, (name, c) in zip(grid.flat, mine, strict=False):
        axes.plot(c.radii, c.plug_in, color=colour(0), linewidth=1.2, linestyle="--", label="plug-in estimate")
        axes.plot(c.radii, c.certified, color=colour(0), label="certified")
        for attack, marker, label in ((False, "o", "fine-tunes"), (True, "X", "attacks")):
            shown = [p for p in c.policies if p.attack == attack and p.kl.mean <= 1.1 * c.radii[-1]]
            axes.errorbar(
                [p.kl.mean for p in shown], [p.reward.mean for p in shown], xerr=_bars([p.kl for p in shown]),
                yerr=_bars([p.reward for p in shown]), color=colour(1 + attack), marker=marker, markersize=6, linestyle="none",
                elinewidth=0.8, label=label,
            )  # fmt: skip
        beyond = sum(p.kl.mean > 1.1 * c.radii[-1] for p in c.policies)
        axes.set(title=name + (f" ({beyond} further out)" if beyond else ""), xlim=(0, 1.1 * c.radii[-1]), ylim=(0, 1.02))
    for axes in grid[-1]:
        axes.set_xlabel("KL(Q || policy), nats")
    for row in grid:
        row[0].set_ylabel(f"reward, {found.focus}")
    figure.tight_layout()
    _legend(grid[0][0])
    return figure


def _bars(values: Sequence[Interval]) -> list[list[float]]:
    return [[v.mean - v.lo for v in values], [v.hi - v.mean for v in values]]


def _trade_off(found: Sweep) -> Figure:
    finetunes = list(found.arms[0].kept)
    families = list(dict.fromkeys(a.family for a in found.arms))
    figure, grid = plt.subplots(1, len(finetunes), figsize=(4.6 * len(finetunes), 3.6), squeeze=False, sharey=True)
    for axes, finetune in zip(grid[0], finetunes, strict=True):
        for i, family in enumerate(families):
            arms = sorted((a for a in found.arms if a.family == family), key=lambda a: a.kl.mean)
            x, y = [a.kl for a in arms], [a.kept[finetune] for a in arms]
            axes.errorbar(
                [v.mean for v in x], [v.mean for v in y],
                xerr=_bars(x), yerr=_bars(y),
                color=colour(i), marker=MARKERS[i % 8], markersize=6, elinewidth=0.8, linewidth=1.4, label=family,
            )  # fmt: skip
        axes.set(title=f"after {finetune}", xlabel="KL to the reference, nats per completion")
    grid[0][0].set_ylabel(f"kept reward, {found.focus} prompts")
    figure.tight_layout()
    _legend(grid[0][0])
    return figure


def over_lam(found: Sweep) -> str:
    """What lambda buys and costs: kept reward, other tasks and KL over it, a weight and kind of penalty a line."""
    lines: dict[tuple[float, str], list[ArmOverSeeds]] = {}
    for a in found.arms:
        if a.lam is not None:
            lines.setdefault((a.beta, a.settings.partition(", ")[2]), []).append(a)
    lines = {key: sorted(arms, key=lambda a: a.lam or 0.0) for key, arms in lines.items() if len({a.lam for a in arms}) >= 2}
    if not lines:
        return ""
    panels: list[tuple[str, Callable[[ArmOverSeeds], Interval | None]]] = [
        *((f"kept after {f}", partial(_kept_after, f)) for f in found.arms[0].kept),
        ("other tasks, before", lambda a: a.others),
        ("KL to the reference, nats", lambda a: a.kl),
    ]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.1), squeeze=False)
        for axes, (title, value) in zip(grid[0], panels, strict=True):
            for i, ((_, label), arms) in enumerate(sorted(lines.items())):
                points = [(a.lam, v) for a in arms if (v := value(a))]
                axes.errorbar(
                    [x for x, _ in points], [v.mean for _, v in points], yerr=_bars([v for _, v in points]), color=colour(i), marker=MARKERS[i % 8], markersize=5, elinewidth=0.8,
                    linewidth=1.4, label=label,
                )  # fmt: skip
            axes.set(title=title, xlabel="λ, reward units", xscale="log")
            lams = sorted({a.lam for arms in lines.values() for a in arms if a.lam is not None})
            axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axes.minorticks_off()
        figure.tight_layout()
        _legend(grid[0][0])
        return _svg(figure, "What lambda buys and costs")


def _kept_after(finetune: str, arm: ArmOverSeeds) -> Interval:
    return arm.kept[finetune]


def training(report: Report) -> str:
    """Reward, KL, entropy and length over the steps of the rlhf stage."""
    names = (("reward", "reward"), ("kl", "KL to reference, nats"), ("entropy", "entropy, nats"), ("length", "length, tokens"))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(8.2, 4.8))
        for axes, (name, title) in zip(grid.flat, names, strict=True):
            for i, curve in enumerate(report.training):
                pairs = [(s, v) for s, v in zip(curve.steps, getattr(curve, name), strict=True) if v is not None]
                values = _smooth([v for _, v in pairs])
                axes.plot([s for s, _ in pairs], values, color=colour(i), label=curve.arm, linewidth=1.6)
            axes.set(title=title)
        for axes in grid[1]:
            axes.set_xlabel("steps")
        figure.tight_layout()
        _legend(grid[0][0])
        return _svg(figure, "Training")


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Trailing mean over `width` steps."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def phases(report: Report) -> str:
    """Seconds per step of each phase, an arm a bar."""
    names = ("generate", "score", "update", "publish", "other")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(report.arms) + 1.1))
        left = [0.0] * len(report.arms)
        for i, name in enumerate(names):
            widths = [a.summary.phase_seconds.get(name, 0.0) / max(1, a.summary.num_steps) for a in report.arms]
            axes.barh([a.name for a in report.arms], widths, left=left, color=colour(i), label=name, height=0.6)
            left = [x + w for x, w in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds per step")
        figure.tight_layout()
        _legend(axes)
        return _svg(figure, "Where the time went")
