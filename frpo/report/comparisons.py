"""Arms compared over seeds: at equal KL, at equal weight of the penalty, and as they are; intervals paired by
seed and prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from frpo.records import Evaluation, Record
from frpo.report.bootstrap import CONFIDENCE, Doubles, Interval, Table, Value, interval_of
from frpo.report.data import rivals
from frpo.report.schema import Report, reward_of

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
    """kl: two methods at one KL to the reference, on the curves that the weight of the penalty draws. beta:
    two methods under one weight of one penalty, as published comparisons have it, each at its own KL. steps:
    two arms as they are, each at its own KL."""
    at_kl: float | None
    """Nats per completion, for those matched by it."""
    at_beta: float | None
    """For those matched by it."""
    kl_difference: Interval | None
    """For those not matched by KL."""
    num_seeds: int
    difference: float
    lo: float
    hi: float
    corrected_lo: float
    """At the confidence that holds for all comparisons of this kind at once (Bonferroni)."""
    corrected_hi: float

    @property
    def verdict(self) -> int:
        """1: a has more; -1: less; 0: the corrected interval contains 0."""
        return (self.corrected_lo > 0) - (self.corrected_hi < 0)


def compare(table: Table) -> tuple[Comparison, ...]:
    """Every metric, matched in each of the three ways."""
    metrics = _metrics(table)
    return (*_at_equal_kl(table, metrics), *_at_equal_beta(table, metrics), *_arm_by_arm(table, metrics))


def kept_after(finetune: str, task: str) -> Value:
    """After a fine-tune, each prompt of a task; one whose rewards all failed counts as the mean."""

    def value(report: Report, arm: int) -> list[float]:
        found = next(k for k in report.arms[arm].kept if (k.downstream, k.task) == (finetune, task))
        return [found.after.mean if v is None else v for v in found.per_prompt]

    return value


def kl_of(report: Report, arm: int) -> float:
    """To the reference before any fine-tune, nats per completion."""
    found = report.arms[arm].evaluation.kl_reference
    return found.mean if found else float("nan")


def mean_of(evaluation: Evaluation, tasks: Sequence[str]) -> float:
    """Reward, mean over tasks."""
    return float(
        np.mean([found.mean for t in tasks if (found := reward_of(evaluation, t))] or [float("nan")])
    )


def end_of(report: Report, arm: int, finetune: str) -> Evaluation:
    """What an arm is after a fine-tune."""
    return next(
        d for d in report.downstream if (d.arm, d.task) == (report.arms[arm].name, finetune)
    ).evaluations[-1]


def certified_at(task: str, radius: float = 0.5) -> Value:
    """Reward that is certified within the radius nearest to the given one, nats; nan without a
    certificate."""

    def value(report: Report, arm: int) -> float:
        found = [r for r in report.robustness if (r.arm, r.task) == (report.arms[arm].name, task)]
        return (
            min(zip(found[0].radii, found[0].certified, strict=True), key=lambda p: abs(p[0] - radius))[1]
            if found
            else float("nan")
        )

    return value


@dataclass(frozen=True)
class _Gap:
    """A comparison before its interval is known."""

    metric: str
    a: str
    b: str
    draws: Doubles
    at_kl: float | None = None
    at_beta: float | None = None
    kl_difference: Interval | None = None

    @property
    def matched_by(self) -> Literal["kl", "beta", "steps"]:
        return "kl" if self.at_kl is not None else "steps" if self.at_beta is None else "beta"

    @property
    def kind(self) -> str:
        """Gaps of one kind are corrected together."""
        return self.metric.partition(" after ")[0]


def _comparisons(table: Table, gaps: Sequence[_Gap]) -> tuple[Comparison, ...]:
    found = []
    for g in gaps:
        sure = interval_of(g.draws, CONFIDENCE)
        corrected = interval_of(g.draws, 1 - (1 - CONFIDENCE) / sum(other.kind == g.kind for other in gaps))
        found.append(
            Comparison(
                metric=g.metric,
                a=g.a,
                b=g.b,
                matched_by=g.matched_by,
                at_kl=g.at_kl,
                at_beta=g.at_beta,
                kl_difference=g.kl_difference,
                num_seeds=len(table.reports),
                difference=sure.mean,
                lo=sure.lo,
                hi=sure.hi,
                corrected_lo=corrected.lo,
                corrected_hi=corrected.hi,
            )
        )
    return tuple(found)


def _metrics(table: Table) -> dict[str, Doubles]:
    """What is compared, [arms, seeds, prompts]."""
    others = [t for t in table.reports[0].tasks if t != table.focus]
    found = {f"kept after {f}": table.of(kept_after(f, table.focus)) for f in table.finetunes}
    found["other tasks"] = table.of(lambda r, i: mean_of(r.arms[i].evaluation, others))
    found["certified"] = table.of(certified_at(table.focus))
    return {metric: values for metric, values in found.items() if np.isfinite(values).all()}


def _arm_by_arm(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Arms as they are, whatever their KL."""
    return _pairwise(table, metrics, rivals([a.penalty for a in table.reports[0].arms]), at_beta=False)


def _at_equal_beta(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Each family against the first of its own penalty, under every weight that both have; steered arms have
    none of their own."""
    arms = [(i, a) for i, a in enumerate(table.reports[0].arms) if a.target_kl is None]
    firsts = {a.penalty: a.family for _, a in reversed(arms)}
    pairs = [
        (i, j)
        for i, a in arms
        for j, b in arms
        if (a.penalty, a.beta) == (b.penalty, b.beta)
        and b.family == firsts[a.penalty]
        and a.family != b.family
    ]
    return _pairwise(table, metrics, pairs, at_beta=True)


def _pairwise(
    table: Table, metrics: Mapping[str, Doubles], pairs: Sequence[tuple[int, int]], *, at_beta: bool
) -> tuple[Comparison, ...]:
    """Two arms each, at the KL that each has; those at equal beta go by the names of their families."""
    arms, kl = table.reports[0].arms, table.of(kl_of)
    apart = [table.measured(kl[a] - kl[b]) for a, b in pairs]
    names, betas = (
        ([a.family for a in arms], [a.beta for a in arms]) if at_beta else (table.arms, [None] * len(arms))
    )
    return _comparisons(
        table,
        [
            _Gap(
                metric,
                names[a],
                names[b],
                table.draws(values[a] - values[b]),
                at_beta=betas[a],
                kl_difference=kls,
            )
            for metric, values in metrics.items()
            for (a, b), kls in zip(pairs, apart, strict=True)
        ],
    )


def _at_equal_kl(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Families of at least two weights of the penalty, where their mean curves overlap in KL.

    A curve is linear between the mean points (KL, value) of its arms; each bootstrap draw draws both anew.
    """
    arms = table.reports[0].arms
    families: dict[str, list[int]] = {}
    for i, arm in enumerate(arms):
        families.setdefault(arm.family, []).append(i)
    curves = {f: rows for f, rows in families.items() if len(rows) >= 2}
    measured = table.of(kl_of)
    if len(curves) < 2 or not np.isfinite(measured).all():
        return ()
    kl = table.draws(measured)
    names = list(curves)
    pairs = [(names[a], names[b]) for a, b in rivals([arms[curves[f][0]].penalty for f in names])]
    gaps = []
    for metric, values in metrics.items():
        drawn = table.draws(values)
        for other, first in pairs:
            spans = [(kl[curves[f], 0].min(), kl[curves[f], 0].max()) for f in (first, other)]
            low, high = max(s[0] for s in spans), min(s[1] for s in spans)
            if low >= high:
                continue
            for at in np.linspace(low, high, NUM_KLS + 2)[1:-1]:
                gap = _at(kl, drawn, curves[other], at) - _at(kl, drawn, curves[first], at)
                gaps.append(_Gap(metric, other, first, gap, at_kl=float(at)))
    return _comparisons(table, gaps)


def _at(kl: Doubles, values: Doubles, arms: list[int], where: float) -> Doubles:
    """Value at one KL on the curve of each draw; kl, values [arms, draws]."""
    order = kl[arms].argsort(axis=0)
    x, y = np.take_along_axis(kl[arms], order, 0), np.take_along_axis(values[arms], order, 0)
    return np.array([np.interp(where, x[:, d], y[:, d]) for d in range(x.shape[1])])
