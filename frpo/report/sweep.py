"""Many runs side by side: run folders -> sweep.json -> sweep.html. Intervals are over seeds and prompts, arms are paired by both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from frpo.config import ConfigError
from frpo.records import Evaluation, Record
from frpo.report.bootstrap import CONFIDENCE, Doubles, Interval, Table, Value, interval_of
from frpo.report.coverage import Coverage, coverage_of
from frpo.report.data import Report, collect, reward_of, rivals

NUM_KLS = 3
"""KLs inside the overlap of two methods at which they are compared."""


class ArmOverSeeds(Record):
    arm: str
    family: str
    """Method and penalty in words, the penalty's weight left out."""
    settings: str
    penalty: str
    beta: float
    lam: float | None
    """For FRPO with a given lambda."""
    num_seeds: int
    num_steps: int
    seconds: float
    """Of its rlhf stage, mean over seeds."""
    kl: Interval
    """To the reference before downstream, nats per completion."""
    before: Interval
    """Reward on the focus task."""
    others: Interval | None
    """Mean reward on the other trained tasks, before downstream: what refusing everything would cost."""
    kept: dict[str, Interval]
    """Reward on the focus task after each downstream fine-tune."""
    others_kept: dict[str, Interval]
    """The same of the other trained tasks."""
    score: dict[str, Interval]
    """Reward on the tasks that were not trained, after each downstream fine-tune: what it taught."""
    certified: Interval | None
    """Within the radius nearest to 0.5 nats."""
    coverage: Coverage | None


class Comparison(Record):
    """a - b, paired by seed and prompt; a positive difference is a lead of a."""

    metric: str
    """"kept after <fine-tune>": reward on the focus task; "other tasks": reward on the other trained tasks before any
    fine-tune; "certified": within the radius nearest to 0.5 nats."""
    a: str
    b: str
    matched_by: Literal["kl", "beta", "steps"]
    """kl: two methods at one KL to the reference, on the curves that the weight of the penalty draws. beta: two methods under one
    weight of one penalty, as published comparisons have it, each at its own KL. steps: two arms as they are, each at its own KL."""
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


class Sweep(Record):
    study: str
    seeds: tuple[int, ...]
    focus: str
    headline: tuple[str, ...]
    arms: tuple[ArmOverSeeds, ...]
    comparisons: tuple[Comparison, ...]


def _kept(finetune: str, task: str) -> Value:
    """After a fine-tune, each prompt of a task; one whose rewards all failed counts as the mean."""

    def value(report: Report, arm: int) -> list[float]:
        found = next(k for k in report.arms[arm].kept if (k.downstream, k.task) == (finetune, task))
        return [found.after.mean if v is None else v for v in found.per_prompt]

    return value


def _kl(report: Report, arm: int) -> float:
    found = report.arms[arm].evaluation.kl_reference
    return found.mean if found else float("nan")


def gather(folders: Sequence[Path]) -> Sweep:
    """Compare runs and sweeps: what differs in its seed is averaged, what differs in its name stands side by side.

    Arms are named run/arm where the runs have several names; only seeds that all of them have are used.
    Raises ConfigError where nothing can be compared.
    """
    runs = [r for f in folders for r in ([f] if (f / "config.yaml").is_file() else sorted(p.parent for p in f.glob("seed-*/report.json")))]
    if not runs:
        raise ConfigError(f"report: {', '.join(map(str, folders))} holds no finished run; give run folders, or the folder of a sweep")
    by_seed: dict[int, list[Report]] = {}
    for report in map(collect, runs):
        by_seed.setdefault(report.seed, []).append(report)
    names = {r.name for found in by_seed.values() for r in found}
    whole = {seed: found for seed, found in sorted(by_seed.items()) if sorted(r.name for r in found) == sorted(names)}
    if not whole:
        raise ConfigError(f"report: no seed was run once under each of the names {sorted(names)}; their seeds are {sorted(by_seed)}")
    reports = [merged(found) for found in whole.values()]
    if len({tuple(a.name for a in r.arms) for r in reports}) > 1:
        raise ConfigError("report: seeds of one name have different arms; give runs of one recipe, or give each recipe its own name")
    focuses = [r.focus for r in reports if r.focus]
    focus = max(sorted(set(focuses)), key=focuses.count) if focuses else reports[0].tasks[0]
    table = Table(reports, focus)
    arms, metrics = _arms(table), _metrics(table)
    comparisons = (*_at_equal_kl(table, arms, metrics), *_at_equal_beta(table, metrics), *_arm_by_arm(table, metrics))
    headline = _headline(table, comparisons)
    return Sweep(study=" + ".join(sorted(names)), seeds=tuple(whole), focus=focus, headline=headline, arms=arms, comparisons=comparisons)


def merged(reports: Sequence[Report]) -> Report:
    """Runs of one seed as one run that has all their arms."""
    if len(reports) == 1:
        return reports[0]

    def named(report: Report, arm: str) -> str:
        return f"{report.name}/{arm}"

    return reports[0].model_copy(
        update={
            "arms": tuple(a.model_copy(update={"name": named(r, a.name)}) for r in reports for a in r.arms),
            "downstream": tuple(d.model_copy(update={"arm": named(r, d.arm)}) for r in reports for d in r.downstream),
            "robustness": tuple(x.model_copy(update={"arm": named(r, x.arm)}) for r in reports for x in r.robustness),
            "tasks": tuple(t for t in reports[0].tasks if all(t in r.tasks for r in reports)),
        }
    )


def _arms(table: Table) -> tuple[ArmOverSeeds, ...]:
    focus, trained = table.focus, set(table.reports[0].tasks)
    measured = {t.task for t in table.reports[0].arms[0].evaluation.rewards}
    others, untrained = sorted(trained - {focus}), sorted(measured - trained)

    def intervals(value: Callable[[str], Value]) -> list[dict[str, Interval]]:
        """For each arm, of each fine-tune."""
        found = {f: table.of(value(f)) for f in table.finetunes}
        return [{f: table.interval(v[i]) for f, v in found.items()} for i in range(len(table.arms))]

    kl, before = table.of(_kl), table.of(lambda r, i: _mean(r.arms[i].evaluation, [focus]))
    other = table.of(lambda r, i: _mean(r.arms[i].evaluation, others))
    certified = table.of(_certified_at(focus))
    kept = intervals(lambda f: _kept(f, focus))
    others_kept = intervals(lambda f: lambda r, i: _mean(_end(r, i, f), others))
    score = intervals(lambda f: lambda r, i: _mean(_end(r, i, f), untrained))
    found = []
    for i, name in enumerate(table.arms):
        arm = table.reports[0].arms[i]
        found.append(
            ArmOverSeeds(
                arm=name, family=arm.family, settings=arm.settings, penalty=arm.penalty, beta=arm.beta, lam=arm.lam,
                num_seeds=len(table.reports), num_steps=arm.summary.num_steps,
                seconds=float(np.mean([r.arms[i].summary.seconds for r in table.reports])),
                kl=table.interval(kl[i]), before=table.interval(before[i]), others=table.interval(other[i]) if others else None,
                kept=kept[i], others_kept=others_kept[i] if others else {}, score=score[i] if untrained else {},
                certified=table.interval(certified[i]) if np.isfinite(certified[i]).all() else None, coverage=coverage_of(table, name),
            )
        )  # fmt: skip
    return tuple(found)


def _mean(evaluation: Evaluation, tasks: Sequence[str]) -> float:
    """Reward, mean over tasks."""
    return float(np.mean([found.mean for t in tasks if (found := reward_of(evaluation, t))] or [float("nan")]))


def _end(report: Report, arm: int, finetune: str) -> Evaluation:
    return next(d for d in report.downstream if (d.arm, d.task) == (report.arms[arm].name, finetune)).evaluations[-1]


def _certified_at(task: str, radius: float = 0.5) -> Value:
    def value(report: Report, arm: int) -> float:
        found = [r for r in report.robustness if (r.arm, r.task) == (report.arms[arm].name, task)]
        return min(zip(found[0].radii, found[0].certified, strict=True), key=lambda p: abs(p[0] - radius))[1] if found else float("nan")

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
                metric=g.metric, a=g.a, b=g.b, matched_by=g.matched_by, at_kl=g.at_kl, at_beta=g.at_beta, kl_difference=g.kl_difference,
                num_seeds=len(table.reports), difference=sure.mean, lo=sure.lo, hi=sure.hi, corrected_lo=corrected.lo, corrected_hi=corrected.hi,
            )
        )  # fmt: skip
    return tuple(found)


def _metrics(table: Table) -> dict[str, Doubles]:
    """What is compared, [arms, seeds, prompts]."""
    others = [t for t in table.reports[0].tasks if t != table.focus]
    found = {f"kept after {f}": table.of(_kept(f, table.focus)) for f in table.finetunes}
    found |= {"other tasks": table.of(lambda r, i: _mean(r.arms[i].evaluation, others))} if others else {}
    certified = table.of(_certified_at(table.focus))
    return found | ({"certified": certified} if np.isfinite(certified).all() else {})


def _arm_by_arm(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Arms as they are, whatever their KL."""
    kl, pairs = table.of(_kl), rivals([a.penalty for a in table.reports[0].arms])
    apart = [table.interval(kl[a] - kl[b]) for a, b in pairs]
    return _comparisons(
        table,
        [
            _Gap(metric, table.arms[a], table.arms[b], table.draws(values[a] - values[b]), kl_difference=kls)
            for metric, values in metrics.items()
            for (a, b), kls in zip(pairs, apart, strict=True)
        ],
    )


def _at_equal_beta(table: Table, metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Each family against the first of its own penalty, under every weight that both have; steered arms have none of their own."""
    arms = [(i, a) for i, a in enumerate(table.reports[0].arms) if a.target_kl is None]
    kl, firsts = table.of(_kl), {a.penalty: a.family for _, a in reversed(arms)}
    pairs = [
        (i, j)
        for i, a in arms
        for j, b in arms
        if (a.penalty, a.beta) == (b.penalty, b.beta) and b.family == firsts[a.penalty] and a.family != b.family
    ]
    return _comparisons(
        table,
        [
            _Gap(
                metric, table.reports[0].arms[i].family, table.reports[0].arms[j].family, table.draws(values[i] - values[j]),
                at_beta=table.reports[0].arms[i].beta, kl_difference=table.interval(kl[i] - kl[j]),
            )
            for metric, values in metrics.items()
            for i, j in pairs
        ],
    )  # fmt: skip


def _at_equal_kl(table: Table, arms: Sequence[ArmOverSeeds], metrics: Mapping[str, Doubles]) -> tuple[Comparison, ...]:
    """Families of at least two weights of the penalty, where their mean curves overlap in KL.

    A curve is linear between the mean points (KL, value) of its arms; each bootstrap draw draws both anew.
    """
    families: dict[str, list[int]] = {}
    for i, arm in enumerate(arms):
        families.setdefault(arm.family, []).append(i)
    curves = {f: rows for f, rows in families.items() if len(rows) >= 2}
    if len(curves) < 2:
        return ()
    kl = table.draws(table.of(_kl))
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


def _headline(table: Table, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The answer first: at equal KL where there are curves, else arm by arm; details for the fine-tune that cost most."""
    kept = [c for c in comparisons if c.metric.startswith("kept ")]
    rows = [c for c in kept if c.matched_by == "kl"] or [c for c in kept if c.matched_by == "steps"]
    harshest = min(table.finetunes, key=lambda f: float(table.of(_kept(f, table.focus)).mean()), default=None)
    words = []
    if rows:
        where = "at equal KL to the reference" if rows[0].matched_by == "kl" else "whatever their KL to the reference"
        more, less, open_ = (sum(r.verdict == v for r in rows) for v in (1, -1, 0))
        words.append(
            f"Against {' and '.join(dict.fromkeys(r.b for r in rows))}, {where}: of {len(rows)} comparisons of kept reward, {more} show more and {less} less; in {open_} the "
            "interval, corrected for their number, contains 0."
        )
    several = len({r.b for r in rows}) > 1
    for a, b in dict.fromkeys((r.a, r.b) for r in rows):
        mine = [r for r in rows if (r.a, r.metric) == (a, f"kept after {harshest}")]
        said = "; ".join(f"{r.difference:+.3f} [{r.lo:+.3f}, {r.hi:+.3f}] at KL {_where(r)}{'*' * abs(r.verdict)}" for r in mine)
        if said:
            words.append(f"{a}{f' against {b}' if several else ''}, after {harshest}: {said}.")
        beside = [c for c in kept if (c.matched_by, c.a, c.b, c.metric) == ("beta", a, b, f"kept after {harshest}")]
        if beside:
            words.append(f"The same at equal β, each at its own KL: {'; '.join(map(_at_beta, beside))}.")
    words.append(
        f"{len(table.reports)} seeds; reward on {table.focus} prompts; 95 % intervals by bootstrap over seeds and prompts, arms paired by "
        "both; * where the corrected interval leaves 0 out."
    )
    if len(table.reports) == 1:
        words.append("This is one seed, and one seed proves nothing: these intervals are over prompts alone.")
    return tuple(words)


def _at_beta(row: Comparison) -> str:
    away = f"{row.kl_difference.mean:+.2f} nats away" if row.kl_difference else ""
    return f"{row.difference:+.3f} [{row.lo:+.3f}, {row.hi:+.3f}] at β {row.at_beta:g}, {away}{'*' * abs(row.verdict)}"


def _where(row: Comparison) -> str:
    return f"{row.at_kl:.2f}" if row.at_kl is not None else f"{row.kl_difference.mean if row.kl_difference else 0:+.2f} nats away"
