"""Plots of the report as inline SVG. Text stays text, colours are CSS variables, so one drawing serves light
and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frpo.records import Certificate, Estimate, Evaluation
from frpo.report.audit_schema import Promise
from frpo.report.lookup import task_reward
from frpo.report.robustness import MeasuredPolicy, Robustness
from frpo.report.schema import Report

INK = "#010203"
GRID = "#010204"
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
    "text.color": "black",
    "axes.labelcolor": "black",
    "xtick.color": "black",
    "ytick.color": "black",
    "axes.edgecolor": "0.8",
    "grid.color": "0.9",
    "savefig.transparent": False,
}
"""For pictures that stand alone."""
PALETTE = ("#2563c9", "#d2620a", "#18875a", "#8a4fc7", "#b3335f", "#7a6a00", "#0f7f8c", "#6b7280")
NUM_COLOURS = len(PALETTE)
IN_VIEW = 1.1
"""A certificate is drawn so far beyond its largest radius."""
KINDS = ((False, "o", "fine-tunes"), (True, "X", "attacks"))
"""Of measured policies: whether an attack, marker, name."""
MARKERS = "osD^vPX*"


def colour_of(index: int) -> str:
    """Of an arm: on a page the placeholder of its CSS variable, on paper the colour itself."""
    number = index % NUM_COLOURS
    return f"#0a0b{number:02x}" if plt.rcParams["text.color"] == INK else PALETTE[number]


def marker_of(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def write_svg(figure: Figure, title: str) -> str:
    """The drawing as text that stands on a page; closes the figure."""
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


def make_panels(count: int, *, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """`count` panels with common axes, at most `columns` a row; width and height of one in inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharex=True, sharey=True
    )
    for spare in grid.flat[count:]:
        spare.set_visible(False)
    return figure, grid


def add_legend(axes: Axes, columns: int = 4) -> None:
    """Below the figure, of what is drawn in one of its panels."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(columns, len(labels))
        )


def draw_downstream(report: Report) -> str:
    """Reward of each rlhf task through each downstream fine-tune, an arm a curve, band = 95 % over
    prompts."""
    finetunes = sorted({run.task for run in report.downstream})
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
                    steps, rewards = _rewards_through(report, arm.name, finetune, task)
                    means = [reward.mean for reward in rewards]
                    low = [reward.mean - (reward.half or 0.0) for reward in rewards]
                    high = [reward.mean + (reward.half or 0.0) for reward in rewards]
                    own = colour_of(i)
                    axes.plot(steps, means, color=own, marker=marker_of(i), markersize=5, label=arm.name)
                    axes.fill_between(steps, low, high, color=own, alpha=0.15, linewidth=0)
                axes.set(title=f"{task} prompts, {finetune}", xlabel="downstream steps")
            row[0].set_ylabel("mean reward")
        figure.tight_layout()
        add_legend(grid[0][0])
        return write_svg(figure, "Reward through downstream fine-tuning")


def _rewards_through(report: Report, arm: str, finetune: str, task: str) -> tuple[list[int], list[Estimate]]:
    """Steps of a fine-tune, and the reward on one task after them, where it was measured."""
    steps: list[int] = []
    rewards: list[Estimate] = []
    for run in report.downstream:
        if (run.arm, run.task) != (arm, finetune):
            continue
        for evaluation in run.evaluations:
            reward = task_reward(evaluation, task)
            if reward:
                steps.append(evaluation.step)
                rewards.append(reward)
    return steps, rewards


def draw_reward_over_kl(report: Report) -> str:
    """Every measured policy: its KL to the reference, and the reward on the task that lost most."""
    focus = report.focus
    if focus is None:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 3.6))
        for i, arm in enumerate(report.arms):
            own = colour_of(i)
            for run in report.downstream:
                if run.arm == arm.name:
                    kls, rewards = _kls_and_rewards(run.evaluations, focus)
                    axes.plot(kls, rewards, color=own, alpha=0.45, linewidth=1.2)
                    axes.scatter(kls[1:], rewards[1:], color=own, s=14)
            kls, rewards = _kls_and_rewards([arm.evaluation], focus)
            if kls:
                label = f"{arm.name}, before"
                axes.scatter(kls, rewards, color=own, s=70, marker=marker_of(i), label=label, zorder=3)
        if report.zero_line is not None:
            edges = (-report.zero_line, report.zero_line)
            axes.axvspan(*edges, color="grey", alpha=0.3, linewidth=0.8, label="a policy against itself")
        axes.set(xlabel="KL to the reference, nats per completion", ylabel=f"reward, {focus} prompts")
        figure.tight_layout()
        add_legend(axes)
        return write_svg(figure, "Reward over KL to the reference")


def _kls_and_rewards(evaluations: Sequence[Evaluation], task: str) -> tuple[list[float], list[float]]:
    """To the reference and on one task, of the policies that both were measured of."""
    kls: list[float] = []
    rewards: list[float] = []
    for evaluation in evaluations:
        reward = task_reward(evaluation, task)
        if evaluation.kl_reference and reward:
            kls.append(evaluation.kl_reference.mean)
            rewards.append(reward.mean)
    return kls, rewards


def draw_planes(report: Report) -> str:
    """Reward over KL(Q || the arm's policy) on the focus task, an arm a panel: certified, plug-in,
    fine-tunes, attacks."""
    planes = [plane for plane in report.robustness if plane.task == report.focus]
    if not planes:
        return ""
    names = [arm.name for arm in report.arms]
    attacked = any(plane.num_attacks for plane in planes)
    with plt.rc_context(STYLE):
        figure, grid = make_panels(len(planes), columns=3, width=4.1, height=3.2)
        for axes, plane in zip(grid.flat, planes, strict=False):
            own = colour_of(names.index(plane.arm))
            draw_curves(axes, plane, own)
            for attack, marker, label in KINDS[: 1 + attacked]:
                points = [point for point in plane.points if point.attack == attack]
                _draw_points(axes, points, plane.radii, colour=own, marker=marker, label=label)
            if plane.radius is not None:
                axes.axvline(plane.radius, color=GRID, linewidth=1.4)
            title = plane.arm
            if plane.radius is not None:
                title += f", trained for {plane.radius:.2f} nats"
            beyond = count_beyond([point.kl.mean for point in plane.points], plane.radii)
            axes.set(title=title + beyond, xlim=(0, IN_VIEW * plane.radii[-1]))
        for axes in grid[-1]:
            axes.set_xlabel("KL(Q || policy), nats per completion")
        for row in grid:
            row[0].set_ylabel(f"reward, {report.focus} prompts")
        figure.tight_layout()
        add_legend(grid[0][0])
        return write_svg(figure, "Certificate and measured policies")


def draw_curves(
    axes: Axes, curve: Certificate | Robustness | Promise, colour: str, certified: str = "certified"
) -> None:
    """Plug-in with its bootstrap interval, and what is certified, which `certified` names."""
    axes.plot(
        curve.radii, curve.plug_in, color=colour, linewidth=1.2, linestyle="--", label="plug-in estimate"
    )
    axes.fill_between(curve.radii, curve.lo, curve.hi, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.radii, curve.certified, color=colour, label=certified)


def _draw_points(
    axes: Axes,
    points: Sequence[MeasuredPolicy],
    radii: Sequence[float],
    *,
    colour: str,
    marker: str,
    label: str,
) -> None:
    """Measured policies that are in view, with their 95 % intervals."""
    shown = [point for point in points if point.kl.mean <= IN_VIEW * radii[-1]]
    axes.errorbar(
        [point.kl.mean for point in shown],
        [point.reward.mean for point in shown],
        xerr=[point.kl.half or 0.0 for point in shown],
        yerr=[point.reward.half or 0.0 for point in shown],
        color=colour,
        marker=marker,
        markersize=6,
        linestyle="none",
        elinewidth=0.7,
        label=label,
    )


def count_beyond(kls: Sequence[float], radii: Sequence[float]) -> str:
    """How many policies lie out of view, for a title; empty for none."""
    beyond = sum(kl > IN_VIEW * radii[-1] for kl in kls)
    return f" ({beyond} further out)" if beyond else ""


def save_certificates(certificates: Sequence[Certificate], file: Path) -> None:
    """A picture of certificates without a run: certified and plug-in, a task a panel."""
    with plt.rc_context(PAPER):
        figure, grid = plt.subplots(
            1, len(certificates), figsize=(4.6 * len(certificates), 3.6), squeeze=False
        )
        for axes, certificate in zip(grid[0], certificates, strict=True):
            draw_curves(axes, certificate, colour_of(0), f"certified, {certificate.confidence:.0%}")
            size = f"{len(certificate.rewards)} prompts x {len(certificate.rewards[0])}"
            axes.set(
                title=f"{certificate.task}: {size}", xlabel="KL radius, nats per completion", ylabel="reward"
            )
            axes.legend()
        figure.tight_layout()
        figure.savefig(file, dpi=130)
        plt.close(figure)


def draw_training(report: Report) -> str:
    """Reward, KL, entropy and length over the steps of the rlhf stage."""
    titles = {
        "reward": "reward",
        "kl": "KL to reference, nats",
        "entropy": "entropy, nats",
        "length": "length, tokens",
    }
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(8.2, 4.8))
        for axes, (name, title) in zip(grid.flat, titles.items(), strict=True):
            for i, curve in enumerate(report.training):
                pairs = zip(curve.steps, getattr(curve, name), strict=True)
                measured = [(step, value) for step, value in pairs if value is not None]
                steps = [step for step, _ in measured]
                values = _trailing_means([value for _, value in measured])
                axes.plot(steps, values, color=colour_of(i), label=curve.arm, linewidth=1.6)
            axes.set(title=title)
        for axes in grid[1]:
            axes.set_xlabel("steps")
        figure.tight_layout()
        add_legend(grid[0][0])
        return write_svg(figure, "Training")


def _trailing_means(values: Sequence[float], width: int = 5) -> list[float]:
    """Trailing mean over `width` steps."""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - width) : end]
        means.append(sum(last) / len(last))
    return means


def draw_phases(report: Report) -> str:
    """Seconds per step of each phase, an arm a bar."""
    phases = ("generate", "score", "update", "publish", "other")
    arms = [arm.name for arm in report.arms]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(arms) + 1.1))
        left = [0.0] * len(arms)
        for i, phase in enumerate(phases):
            widths = [
                arm.summary.phase_seconds.get(phase, 0.0) / max(1, arm.summary.num_steps)
                for arm in report.arms
            ]
            axes.barh(arms, widths, left=left, color=colour_of(i), label=phase, height=0.6)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds per step")
        figure.tight_layout()
        add_legend(axes)
        return write_svg(figure, "Where the time went")
