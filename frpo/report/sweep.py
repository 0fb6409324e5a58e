"""Many runs side by side: run folders -> sweep.json -> sweep.html. Intervals are over seeds and prompts, arms
are paired by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from frpo.config import ConfigError
from frpo.records import Record
from frpo.report.bootstrap import Interval, Table, Value
from frpo.report.comparisons import Comparison, certified_at, compare, end_of, kept_after, kl_of, mean_of
from frpo.report.coverage import Coverage, coverage_of
from frpo.report.data import collect
from frpo.report.schema import Report


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
    kl: Interval | None
    """To the reference before downstream, nats per completion; None without held-out prompts of a trained
    task."""
    before: Interval | None
    """Reward on the focus task."""
    others: Interval | None
    """Mean reward on the other trained tasks, before downstream: what refusing everything would cost."""
    kept: dict[str, Interval | None]
    """Reward on the focus task after each downstream fine-tune."""
    others_kept: dict[str, Interval | None]
    """The same of the other trained tasks."""
    score: dict[str, Interval | None]
    """Reward on the tasks that were not trained, after each downstream fine-tune: what it taught."""
    certified: Interval | None
    """Within the radius nearest to 0.5 nats."""
    coverage: Coverage | None


class Sweep(Record):
    study: str
    seeds: tuple[int, ...]
    focus: str
    headline: tuple[str, ...]
    arms: tuple[ArmOverSeeds, ...]
    comparisons: tuple[Comparison, ...]


def gather(folders: Sequence[Path]) -> Sweep:
    """Compare runs and sweeps: what differs in its seed is averaged, what differs in its name stands side by
    side.

    Arms are named run/arm where the runs have several names; only seeds that all of them have are used.
    Raises ConfigError where nothing can be compared.
    """
    runs = [
        r
        for f in folders
        for r in (
            [f] if (f / "config.yaml").is_file() else sorted(p.parent for p in f.glob("seed-*/report.json"))
        )
    ]
    if not runs:
        raise ConfigError(
            f"report: {', '.join(map(str, folders))} holds no finished run; give run folders, or the folder "
            "of a sweep"
        )
    by_seed: dict[int, list[Report]] = {}
    for report in map(collect, runs):
        by_seed.setdefault(report.seed, []).append(report)
    names = {r.name for found in by_seed.values() for r in found}
    whole = {
        seed: found
        for seed, found in sorted(by_seed.items())
        if sorted(r.name for r in found) == sorted(names)
    }
    if not whole:
        raise ConfigError(
            f"report: no seed was run once under each of the names {sorted(names)}; their seeds are "
            f"{sorted(by_seed)}"
        )
    reports = [merged(found) for found in whole.values()]
    if len({tuple(a.name for a in r.arms) for r in reports}) > 1:
        raise ConfigError(
            "report: seeds of one name have different arms; give runs of one recipe, or give each recipe its "
            "own name"
        )
    focuses = [r.focus for r in reports if r.focus]
    focus = max(sorted(set(focuses)), key=focuses.count) if focuses else reports[0].tasks[0]
    table = Table(reports, focus)
    comparisons = compare(table)
    headline = _headline(table, comparisons)
    return Sweep(
        study=" + ".join(sorted(names)),
        seeds=tuple(whole),
        focus=focus,
        headline=headline,
        arms=_arms(table),
        comparisons=comparisons,
    )


def merged(reports: Sequence[Report]) -> Report:
    """Runs of one seed as one run that has all their arms."""
    if len(reports) == 1:
        return reports[0]

    def named(report: Report, arm: str) -> str:
        return f"{report.name}/{arm}"

    return reports[0].model_copy(
        update={
            "arms": tuple(a.model_copy(update={"name": named(r, a.name)}) for r in reports for a in r.arms),
            "downstream": tuple(
                d.model_copy(update={"arm": named(r, d.arm)}) for r in reports for d in r.downstream
            ),
            "robustness": tuple(
                x.model_copy(update={"arm": named(r, x.arm)}) for r in reports for x in r.robustness
            ),
            "tasks": tuple(t for t in reports[0].tasks if all(t in r.tasks for r in reports)),
        }
    )


def _arms(table: Table) -> tuple[ArmOverSeeds, ...]:
    focus, trained = table.focus, set(table.reports[0].tasks)
    measured = {t.task for t in table.reports[0].arms[0].evaluation.rewards}
    others, untrained = sorted(trained - {focus}), sorted(measured - trained)

    def intervals(value: Callable[[str], Value]) -> list[dict[str, Interval | None]]:
        """For each arm, of each fine-tune."""
        found = {f: table.of(value(f)) for f in table.finetunes}
        return [{f: table.measured(v[i]) for f, v in found.items()} for i in range(len(table.arms))]

    kl, before = table.of(kl_of), table.of(lambda r, i: mean_of(r.arms[i].evaluation, [focus]))
    other = table.of(lambda r, i: mean_of(r.arms[i].evaluation, others))
    certified = table.of(certified_at(focus))
    kept = intervals(lambda f: kept_after(f, focus))
    others_kept = intervals(lambda f: lambda r, i: mean_of(end_of(r, i, f), others))
    score = intervals(lambda f: lambda r, i: mean_of(end_of(r, i, f), untrained))
    found = []
    for i, name in enumerate(table.arms):
        arm = table.reports[0].arms[i]
        found.append(
            ArmOverSeeds(
                arm=name,
                family=arm.family,
                settings=arm.settings,
                penalty=arm.penalty,
                beta=arm.beta,
                lam=arm.lam,
                num_seeds=len(table.reports),
                num_steps=arm.summary.num_steps,
                seconds=float(np.mean([r.arms[i].summary.seconds for r in table.reports])),
                kl=table.measured(kl[i]),
                before=table.measured(before[i]),
                others=table.measured(other[i]),
                kept=kept[i],
                others_kept=others_kept[i] if others else {},
                score=score[i] if untrained else {},
                certified=table.measured(certified[i]),
                coverage=coverage_of(table, name),
            )
        )
    return tuple(found)


def _headline(table: Table, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The answer first: at equal KL where there are curves, else arm by arm; details for the fine-tune that
    cost most."""
    kept = [c for c in comparisons if c.metric.startswith("kept ")]
    rows = [c for c in kept if c.matched_by == "kl"] or [c for c in kept if c.matched_by == "steps"]
    harshest = min(
        table.finetunes, key=lambda f: float(table.of(kept_after(f, table.focus)).mean()), default=None
    )
    words = []
    if rows:
        where = (
            "at equal KL to the reference"
            if rows[0].matched_by == "kl"
            else "whatever their KL to the reference"
        )
        more, less, open_ = (sum(r.verdict == v for r in rows) for v in (1, -1, 0))
        words.append(
            f"Against {' and '.join(dict.fromkeys(r.b for r in rows))}, {where}: of {len(rows)} comparisons "
            f"of kept reward, {more} show more and {less} less; in {open_} the "
            "interval, corrected for their number, contains 0."
        )
    several = len({r.b for r in rows}) > 1
    for a, b in dict.fromkeys((r.a, r.b) for r in rows):
        mine = [r for r in rows if (r.a, r.metric) == (a, f"kept after {harshest}")]
        if mine:
            words.append(
                f"{a}{f' against {b}' if several else ''}, after {harshest}: {'; '.join(map(_said, mine))}."
            )
        beside = [
            c for c in kept if (c.matched_by, c.a, c.b, c.metric) == ("beta", a, b, f"kept after {harshest}")
        ]
        if beside:
            words.append(f"The same at equal β, each at its own KL: {'; '.join(map(_said, beside))}.")
    words.append(
        f"{len(table.reports)} seeds; reward on {table.focus} prompts; 95 % intervals by bootstrap over "
        "seeds and prompts, arms paired by "
        "both; * where the corrected interval leaves 0 out."
    )
    if len(table.reports) == 1:
        words.append("This is one seed, and one seed proves nothing: these intervals are over prompts alone.")
    return tuple(words)


def _said(row: Comparison) -> str:
    at = {"kl": f"KL {row.at_kl or 0:.2f}", "beta": f"β {row.at_beta or 0:g},", "steps": "KL"}[row.matched_by]
    away = f" {row.kl_difference.mean:+.2f} nats away" if row.kl_difference else ""
    return f"{row.difference:+.3f} [{row.lo:+.3f}, {row.hi:+.3f}] at {at}{away}{'*' * abs(row.verdict)}"
