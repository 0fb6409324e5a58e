"""Plots of a run's page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from frpo.records import Certificate, Estimate, Evaluation
from frpo.report.audit_schema import Promise
from frpo.report.drawing import (
    GRID,
    PAPER,
    Panel,
    colour_of,
    line_of,
    mark,
    mark_value,
    marker_of,
    panel,
)
from frpo.report.lookup import task_reward
from frpo.report.robustness import MeasuredPolicy, Robustness
from frpo.report.schema import Arm, Downstream, Report

IN_VIEW = 1.1
"""A certificate is drawn so far beyond its largest radius."""
KINDS = ((False, "o", "fine-tunes"), (True, "X", "attacks"))
"""Of measured policies: whether an attack, marker, name."""
DRAWN = 60
"""Points of a training curve, whose last is the last step."""
POINTED = 8
"""So many points of a training curve say their value when they are pointed at."""


def draw_downstream(report: Report, tasks: Sequence[str]) -> list[Panel]:
    """Reward on each of the tasks through each downstream fine-tune, an arm a curve, band = 95 % over
    prompts."""
    panels: list[Panel] = []
    finetunes = sorted({run.task for run in report.downstream})
    for task, finetune in itertools.product(tasks, finetunes):
        with panel(panels, "downstream", f"{task} prompts, {finetune}") as axes:
            axes.set_ylim(*limits_of(report, task))
            for i, arm in enumerate(report.arms):
                _draw_rewards(axes, i, arm.name, _rewards_through(report, arm.name, finetune, task))
            axes.set(xlabel="steps of the fine-tune", ylabel="mean reward")
    return panels


def limits_of(report: Report, task: str) -> tuple[float, float]:
    """That all panels of a task have, so that they can be compared: intervals are within."""
    ends: list[float] = []
    for run in report.downstream:
        for evaluation in run.evaluations:
            reward = task_reward(evaluation, task)
            if reward:
                ends += [reward.mean - (reward.half or 0.0), reward.mean + (reward.half or 0.0)]
    if not ends:
        return 0.0, 1.0
    margin = 0.04 * (max(ends) - min(ends)) + 0.02
    return min(ends) - margin, max(ends) + margin


def _draw_rewards(axes: Axes, i: int, arm: str, measured: tuple[list[int], list[Estimate]]) -> None:
    """Over steps."""
    steps, rewards = measured
    low = [reward.mean - (reward.half or 0.0) for reward in rewards]
    high = [reward.mean + (reward.half or 0.0) for reward in rewards]
    own = colour_of(i)
    mark(axes.plot(steps, [reward.mean for reward in rewards], line_of(i), color=own), i, arm)
    mark(axes.fill_between(steps, low, high, color=own, alpha=0.15, linewidth=0), i)
    for step, reward in zip(steps, rewards, strict=True):
        point = axes.plot([step], [reward.mean], marker_of(i), color=own, markersize=6, clip_on=False)
        mark(point, i, f"{arm}, step {step}: {reward:z.2f}")


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


def draw_reward_over_kl(report: Report) -> list[Panel]:
    """Every measured policy: its KL to the reference, and the reward on each task of the rlhf stage."""
    panels: list[Panel] = []
    for task in report.tasks if report.focus else ():
        with panel(panels, "distance", f"{task} prompts") as axes:
            for i, arm in enumerate(report.arms):
                for run in report.downstream:
                    if run.arm == arm.name:
                        _draw_way(axes, i, run, task)
                _draw_start(axes, i, arm, task)
            if report.zero_line is not None:
                edges = (-report.zero_line, report.zero_line)
                zero = axes.axvspan(*edges, color="grey", alpha=0.3, linewidth=0.8)
                mark(zero, None, "a policy against itself")
            axes.set(xlabel="KL to the reference, nats", ylabel="mean reward")
    return panels


def _draw_way(axes: Axes, i: int, run: Downstream, task: str) -> None:
    """Through a fine-tune."""
    own = colour_of(i)
    kls, rewards = _kls_and_rewards(run.evaluations, task)
    mark(
        axes.plot(kls, rewards, line_of(i), color=own, alpha=0.45, linewidth=1.2), i, f"{run.arm}, {run.task}"
    )
    for kl, reward in list(zip(kls, rewards, strict=True))[1:]:
        words = f"{run.arm}, {run.task}: reward {reward:.2f} at {kl:.2f} nats"
        mark(axes.plot([kl], [reward], "o", color=own, markersize=4.5), i, words)


def _draw_start(axes: Axes, i: int, arm: Arm, task: str) -> None:
    """Before any fine-tune."""
    for kl, reward in zip(*_kls_and_rewards([arm.evaluation], task), strict=True):
        words = f"{arm.name}, before: reward {reward:.2f} at {kl:.2f} nats"
        start = axes.plot([kl], [reward], marker_of(i), color=colour_of(i), markersize=9, zorder=3)
        mark(start, i, words)


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


def draw_planes(report: Report) -> list[Panel]:
    """Reward over KL(Q || the arm's policy) on the focus task, an arm a panel: certified, plug-in,
    fine-tunes, attacks."""
    panels: list[Panel] = []
    names = [arm.name for arm in report.arms]
    for plane in report.robustness:
        if plane.task != report.focus:
            continue
        own = colour_of(names.index(plane.arm))
        title = plane.arm
        if plane.radius is not None:
            title += f", trained for {plane.radius:.2f} nats"
        title += count_beyond([point.kl.mean for point in plane.points], plane.radii)
        with panel(panels, "certificate", title) as axes:
            draw_curves(axes, plane, own)
            for attack, marker, _ in KINDS:
                points = [point for point in plane.points if point.attack == attack]
                _draw_points(axes, points, plane.radii, colour=own, marker=marker)
            if plane.radius is not None:
                mark(axes.axvline(plane.radius, color=GRID, linewidth=1.4), None, "trained for this radius")
            axes.set(xlim=(0, IN_VIEW * plane.radii[-1]))
            axes.set(xlabel="KL from the arm's policy, nats", ylabel=f"reward, {report.focus}")
    return panels


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
    axes: Axes, points: Sequence[MeasuredPolicy], radii: Sequence[float], *, colour: str, marker: str
) -> None:
    """Measured policies that are in view, with their 95 % intervals."""
    for point in points:
        if point.kl.mean <= IN_VIEW * radii[-1]:
            drawn = axes.errorbar(
                [point.kl.mean],
                [point.reward.mean],
                xerr=[point.kl.half or 0.0],
                yerr=[point.reward.half or 0.0],
                color=colour,
                marker=marker,
                markersize=6,
                elinewidth=0.7,
            )
            words = f"{point.name}, step {point.step}: reward {point.reward:.2f} at {point.kl:.2f} nats"
            mark((drawn[0], *drawn[2]), None, words)


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


def draw_training(report: Report) -> list[Panel]:
    """Reward, KL, entropy and length over the steps of the rlhf stage."""
    titles = {
        "reward": "reward",
        "kl": "KL to the reference, nats",
        "entropy": "entropy, nats",
        "length": "length, tokens",
    }
    panels: list[Panel] = []
    for name, title in titles.items() if report.training else ():
        with panel(panels, "training", title) as axes:
            for i, curve in enumerate(report.training):
                pairs = zip(curve.steps, getattr(curve, name), strict=True)
                measured = [(step, value) for step, value in pairs if value is not None]
                _draw_curve(axes, i, curve.arm, measured)
            axes.set_xlabel("steps")
    return panels


def _draw_curve(axes: Axes, i: int, arm: str, measured: Sequence[tuple[int, float]]) -> None:
    apart = max(1, math.ceil(len(measured) / DRAWN))
    steps = [step for step, _ in measured][::-apart][::-1]
    values = _trailing_means([value for _, value in measured])[::-apart][::-1]
    mark(axes.plot(steps, values, line_of(i), color=colour_of(i), linewidth=1.6), i, arm)
    for step, value in list(zip(steps, values, strict=True))[:: -max(1, len(steps) // POINTED)]:
        digits = 0 if abs(value) >= 100 else 3
        mark_value(axes, step, value, i, f"{arm}, steps up to {step}: {value:.{digits}f}")


def _trailing_means(values: Sequence[float], width: int = 5) -> list[float]:
    """Trailing mean over `width` steps."""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - width) : end]
        means.append(sum(last) / len(last))
    return means
