"""The certificate's plane over several seeds, and where their fine-tunes and attacks lie on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from frpo.records import Record
from frpo.report.intervals import Interval, Table, interval_of
from frpo.report.lookup import mean_or_nan
from frpo.report.robustness import MeasuredPolicy, Robustness
from frpo.report.schema import Report


class PolicyOverSeeds(Record):
    """A fine-tune or attack after so many steps; the reward is on the focus task."""

    name: str
    attack: bool
    step: int
    kl: Interval
    """KL(Q || the arm's policy), nats per completion."""
    reward: Interval
    certified: Interval
    """Lower bound at the upper 95 % limit of its KL."""
    plug_in: Interval
    """Plug-in estimate at its KL."""


class Coverage(Record):
    """The certificate's plane of the focus task, and where the measured policies of all seeds lie on it."""

    radii: tuple[float, ...]
    certified: tuple[float, ...]
    """At each radius, mean over seeds."""
    plug_in: tuple[float, ...]
    policies: tuple[PolicyOverSeeds, ...]

    fine_tunes: int
    inside: int | None
    """Of the fine-tunes, those within the arm's radius; None for an arm without one."""
    attacks: int
    below: int
    """Of all, those whose reward's upper limit lies below what was certified at their KL."""
    above_certified: Interval | None
    """Reward of fine-tunes minus what was certified at their KL."""
    attack_above_certified: Interval | None


def coverage_of(table: Table, arm: str) -> Coverage | None:
    """On the focus task; None where not every seed of the arm was certified."""
    planes = [_plane_of(report, arm, table.focus) for report in table.reports]
    runs = [plane for plane in planes if plane]
    if len(runs) < len(planes):
        return None
    policies = zip(*(run.points for run in runs), strict=True)
    return Coverage(
        radii=runs[0].radii,
        certified=tuple(np.mean([run.certified for run in runs], axis=0)),
        plug_in=tuple(np.mean([run.plug_in for run in runs], axis=0)),
        policies=tuple(_over_seeds(policy) for policy in policies),
        fine_tunes=sum(len(run.fine_tunes) for run in runs),
        inside=None if runs[0].radius is None else sum(run.num_inside for run in runs),
        attacks=sum(run.num_attacks for run in runs),
        below=sum(run.num_below for run in runs),
        above_certified=_above_certified(runs, attack=False),
        attack_above_certified=_above_certified(runs, attack=True),
    )


def _plane_of(report: Report, arm: str, task: str) -> Robustness | None:
    return next((plane for plane in report.robustness if (plane.arm, plane.task) == (arm, task)), None)


def _interval_over_seeds(values: Iterable[float]) -> Interval:
    """Of one number a seed."""
    return interval_of(np.array([[value] for value in values]))


def _over_seeds(points: Sequence[MeasuredPolicy]) -> PolicyOverSeeds:
    """One policy, given as it was measured in every seed."""
    return PolicyOverSeeds(
        name=points[0].name,
        attack=points[0].attack,
        step=points[0].step,
        kl=_interval_over_seeds(point.kl.mean for point in points),
        reward=_interval_over_seeds(point.reward.mean for point in points),
        certified=_interval_over_seeds(point.certified for point in points),
        plug_in=_interval_over_seeds(point.plug_in for point in points),
    )


def _above_certified(runs: Sequence[Robustness], *, attack: bool) -> Interval | None:
    """Reward minus what was certified, mean over the policies of a seed; None where a seed has none."""
    means = []
    for run in runs:
        gaps = [point.reward.mean - point.certified for point in run.points if point.attack == attack]
        means.append(mean_or_nan(gaps))
    return None if np.isnan(means).any() else _interval_over_seeds(means)
