"""Arms compared over seeds: at equal KL, at equal weight of the penalty, and as they are; paired by seed and
prompt."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from frpo.records import Evaluation, Record
from frpo.report.data import rival_pairs
from frpo.report.intervals import (
    Doubles,
    Interval,
    Table,
    Value,
    interval_of,
    interval_or_none,
)
from frpo.report.lookup import mean_or_nan, nearest, task_reward
from frpo.report.paired import fill_failed, kept_rewards
from frpo.report.schema import Report
from frpo.report.student import CONFIDENCE

NUM_KLS = 3
"""KLs inside the overlap of two methods at which they are compared."""


class Comparison(Record):
    """a - b, paired by seed and prompt; a positive difference is a lead of a."""

    metric: str
    """"kept after <fine-tune>": reward on the focus task; "other tasks": reward on the other trained tasks
    before any fine-tune; "certified": within the radius nearest to 0.5 nats."""
    a: str
    b: str
    matched_by: Literal["kl", "beta", "steps"]
    """kl: two methods at one KL to the reference, on the curves that the weight of the penalty draws in each
    seed. beta: two methods under one weight of one penalty, as published comparisons have it, each at its own
    KL. steps: two arms as they are, each at its own KL."""
    at_kl: float | None
    """Nats per completion, for those matched by it."""
    at_beta: float | None
    """For those matched by it."""
    kl_difference: Interval | None
    """For those not matched by KL."""
    num_seeds: int
    """At equal KL those whose arms reach it, of both methods."""
    difference: float
    lo: float | None
    hi: float | None
    """None from fewer than `intervals.MIN_SEEDS`."""
    corrected_lo: float | None
    """At the confidence that holds for all comparisons of this kind at once (Bonferroni)."""
    corrected_hi: float | None

    @property
    def verdict(self) -> int:
        """1: a has more; -1: less; 0: the corrected interval contains 0, or there is none."""
        if self.corrected_lo is None or self.corrected_hi is None:
            return 0
        return (self.corrected_lo > 0) - (self.corrected_hi < 0)

    @property
    def interval(self) -> Interval:
        return Interval(mean=self.difference, lo=self.lo, hi=self.hi)


def compare_arms(table: Table) -> tuple[Comparison, ...]:
    """Every metric, matched in each of the three ways."""
    metrics = _measure_metrics(table)
    at_equal_kl = _compare_at_equal_kl(table, metrics)
    at_equal_beta = _compare_at_equal_beta(table, metrics)
    return (*at_equal_kl, *at_equal_beta, *_compare_arm_by_arm(table, metrics))


def kept_after(finetune: str, task: str) -> Value:
    """After a fine-tune, each prompt of a task; one whose rewards all failed counts as the mean."""

    def value(report: Report, arm: int) -> list[float]:
        kept = next(k for k in report.arms[arm].kept if (k.downstream, k.task) == (finetune, task))
        return fill_failed(kept_rewards(kept))

    return value


def kl_of(report: Report, arm: int) -> float:
    """To the reference before any fine-tune, nats per completion; nan where it was not measured."""
    kl = report.arms[arm].evaluation.kl_reference
    return kl.mean if kl else float("nan")


def mean_of(evaluation: Evaluation, tasks: Sequence[str]) -> float:
    """Reward, mean over those of the tasks that were measured; nan for none of them."""
    rewards = [task_reward(evaluation, task) for task in tasks]
    return mean_or_nan([reward.mean for reward in rewards if reward])


def end_of(report: Report, arm: int, finetune: str) -> Evaluation:
    """What an arm is after a fine-tune."""
    wanted = (report.arms[arm].name, finetune)
    run = next(run for run in report.downstream if (run.arm, run.task) == wanted)
    return run.evaluations[-1]


def certified_within(task: str, radius: float = 0.5) -> Value:
    """Reward that is certified within the radius nearest to the given one, nats; nan without a
    certificate."""

    def value(report: Report, arm: int) -> float:
        wanted = (report.arms[arm].name, task)
        planes = [plane for plane in report.robustness if (plane.arm, plane.task) == wanted]
        if not planes:
            return float("nan")
        return nearest(planes[0].radii, planes[0].certified, radius)

    return value


@dataclass(frozen=True)
class _Gap:
    """A comparison before its interval is known."""

    metric: str
    a: str
    b: str
    values: Doubles
    """[seeds, prompts]"""
    at_kl: float | None = None
    at_beta: float | None = None
    kl_difference: Interval | None = None

    @property
    def matched_by(self) -> Literal["kl", "beta", "steps"]:
        if self.at_kl is not None:
            return "kl"
        if self.at_beta is not None:
            return "beta"
        return "steps"

    @property
    def kind(self) -> str:
        """Gaps of one kind are corrected together."""
        return self.metric.partition(" after ")[0]


def _add_intervals(gaps: Sequence[_Gap]) -> tuple[Comparison, ...]:
    """Each gap with its interval, and with the one that is corrected for the number of its kind."""
    sizes = Counter(gap.kind for gap in gaps)
    comparisons = []
    for gap in gaps:
        sure = interval_of(gap.values)
        corrected = interval_of(gap.values, 1 - (1 - CONFIDENCE) / sizes[gap.kind])
        comparisons.append(
            Comparison(
                metric=gap.metric,
                a=gap.a,
                b=gap.b,
                matched_by=gap.matched_by,
                at_kl=gap.at_kl,
                at_beta=gap.at_beta,
                kl_difference=gap.kl_difference,
                num_seeds=len(gap.values),
                difference=sure.mean,
                lo=sure.lo,
                hi=sure.hi,
                corrected_lo=corrected.lo,
                corrected_hi=corrected.hi,
            )
        )
    return tuple(comparisons)


def _measure_metrics(table: Table) -> dict[str, Doubles]:
    """What is compared, [arms, seeds, prompts]; left out where not every seed has a number."""
    others = [task for task in table.reports[0].tasks if task != table.focus]
    metrics = {f"kept after {name}": table.of(kept_after(name, table.focus)) for name in table.finetunes}
    metrics["other tasks"] = table.of(lambda report, i: mean_of(report.arms[i].evaluation, others))
    metrics["certified"] = table.of(certified_within(table.focus))
    return {metric: values for metric, values in metrics.items() if np.isfinite(values).all()}


def _compare_arm_by_arm(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Arms as they are, whatever their KL."""
    pairs = rival_pairs([arm.penalty for arm in table.reports[0].arms])
    return _add_intervals(_gaps_of_pairs(table, metrics, pairs))


def _compare_at_equal_beta(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Each family against the first of its own penalty, under every weight that both have; steered arms have
    none of their own. Both go by the names of their families."""
    arms = table.reports[0].arms
    fixed = [i for i, arm in enumerate(arms) if arm.target_kl is None]
    firsts = {arms[i].penalty: arms[i].family for i in reversed(fixed)}
    pairs = []
    for a, b in itertools.product(fixed, fixed):
        first = firsts[arms[a].penalty]
        same_weight = (arms[a].penalty, arms[a].beta) == (arms[b].penalty, arms[b].beta)
        if same_weight and arms[b].family == first and arms[a].family != first:
            pairs.append((a, b))
    named = {arm.name: arm for arm in arms}
    gaps = []
    for gap in _gaps_of_pairs(table, metrics, pairs):
        arm = named[gap.a]
        gaps.append(replace(gap, a=arm.family, b=named[gap.b].family, at_beta=arm.beta))
    return _add_intervals(gaps)


def _gaps_of_pairs(
    table: Table, metrics: Mapping[str, Doubles], pairs: Sequence[tuple[int, int]]
) -> list[_Gap]:
    """Two arms each, by index, at the KL that each has."""
    kl = table.of(kl_of)
    apart = {(a, b): interval_or_none(kl[a] - kl[b]) for a, b in pairs}
    gaps = []
    for metric, values in metrics.items():
        for a, b in pairs:
            gap = values[a] - values[b]
            gaps.append(_Gap(metric, table.arms[a], table.arms[b], gap, kl_difference=apart[a, b]))
    return gaps


def _compare_at_equal_kl(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Families of at least two weights of the penalty, where their mean curves overlap in KL; each seed is
    read off its own curves."""
    kl = table.of(kl_of)[..., 0]
    if not np.isfinite(kl).all():
        return ()
    curves = _curves_of(table)
    names = list(curves)
    pairs = rival_pairs([table.reports[0].arms[curves[name][0]].penalty for name in names])
    gaps = []
    for (metric, values), (a, b) in itertools.product(metrics.items(), pairs):
        other = curves[names[a]]
        first = curves[names[b]]
        for at_kl in _shared_kls(kl[first].mean(axis=1), kl[other].mean(axis=1)):
            gap = read_curves(kl[other], values[other], at_kl)
            gap -= read_curves(kl[first], values[first], at_kl)
            reached = gap[np.isfinite(gap).all(axis=1)]
            if len(reached):
                gaps.append(_Gap(metric, names[a], names[b], reached, at_kl=at_kl))
    return _add_intervals(gaps)


def _curves_of(table: Table) -> dict[str, list[int]]:
    """The arms of each family that has at least two."""
    families: dict[str, list[int]] = {}
    for i, arm in enumerate(table.reports[0].arms):
        families.setdefault(arm.family, []).append(i)
    return {family: arms for family, arms in families.items() if len(arms) >= 2}


def _shared_kls(first: Doubles, other: Doubles) -> list[float]:
    """NUM_KLS at equal distances inside the overlap of two curves, given the KLs of their points; none where
    they do not overlap.

    Example: KLs 0 to 1 and 0.2 to 2 are compared at 0.4, 0.6 and 0.8.
    """
    low = max(first.min(), other.min())
    high = min(first.max(), other.max())
    if low >= high:
        return []
    return [float(kl) for kl in np.linspace(low, high, NUM_KLS + 2)[1:-1]]


def read_curves(kl: Doubles, values: Doubles, at_kl: float) -> Doubles:
    """Value at one KL on the curve of each seed, linear between its arms; nan for seeds whose arms do not
    reach it. kl [arms, seeds], values [arms, seeds, prompts] -> [seeds, prompts]

    Example: arms at KLs 0.2 and 0.6 with values 0.5 and 0.9 give 0.7 at KL 0.4, and nan at 0.7.
    """
    curves = []
    for of_seed, points in zip(kl.T, values.swapaxes(0, 1), strict=True):
        order = of_seed.argsort()
        known = of_seed[order]
        columns = points[order].T
        curves.append([np.interp(at_kl, known, column, left=np.nan, right=np.nan) for column in columns])
    return np.array(curves)
