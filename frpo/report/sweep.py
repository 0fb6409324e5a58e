"""Many runs side by side: run folders -> sweep.json -> sweep.html."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from frpo.config import ConfigError
from frpo.records import Record
from frpo.report import sweep_headline
from frpo.report.comparisons import (
    Comparison,
    certified_within,
    compare_arms,
    end_of,
    kept_after,
    kl_of,
    mean_of,
)
from frpo.report.coverage import Coverage, coverage_of
from frpo.report.data import collect_report
from frpo.report.frontier import FrontierPoint
from frpo.report.intervals import METHOD, Interval, Table, Value, interval_or_none
from frpo.report.robustness import Robustness
from frpo.report.schema import Arm, Downstream, Report


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
    intervals: str
    """How they were made."""
    headline: tuple[str, ...]
    verdicts: tuple[sweep_headline.SeedVerdict, ...]
    """Of the seeds that have one; none where runs of several names stand side by side."""
    arms: tuple[ArmOverSeeds, ...]
    comparisons: tuple[Comparison, ...]


def gather_sweep(folders: Sequence[Path]) -> Sweep:
    """Compare runs and sweeps: what differs in its seed is averaged, what differs in its name stands side by
    side.

    Arms are named run/arm where the runs have several names; only seeds that all of them have are used.
    Raises ConfigError where nothing can be compared.
    """
    reports = [collect_report(run) for run in _run_folders(folders)]
    names = sorted({report.name for report in reports})
    by_seed = _complete_seeds(reports, names)
    joined = [join_arms(of_seed) for of_seed in by_seed.values()]
    if len(set(map(_arm_names, joined))) > 1:
        raise ConfigError(
            "report: seeds of one name have different arms; give runs of one recipe, or give each recipe its "
            "own name"
        )
    focuses = [report.focus for report in joined if report.focus]
    focus = max(sorted(set(focuses)), key=focuses.count) if focuses else joined[0].tasks[0]
    table = Table(joined, focus)
    comparisons = compare_arms(table)
    answer, *details = sweep_headline.of_sweep(
        comparisons,
        finetunes=sorted(table.finetunes, key=partial(_from_half, table)),
        focus=focus,
        num_seeds=len(joined),
        intervals=METHOD,
    )
    verdicts = tuple(_verdicts(joined))
    return Sweep(
        study=" + ".join(names),
        seeds=tuple(by_seed),
        focus=focus,
        intervals=METHOD,
        headline=(answer, *sweep_headline.of_verdicts(verdicts), *details),
        verdicts=verdicts,
        arms=tuple(_arms_over_seeds(table)),
        comparisons=comparisons,
    )


def _run_folders(folders: Sequence[Path]) -> list[Path]:
    """Runs as they are, and the finished seeds of sweeps. Raises ConfigError for none."""
    runs: list[Path] = []
    for folder in folders:
        if (folder / "config.yaml").is_file():
            runs.append(folder)
        else:
            runs += sorted(report.parent for report in folder.glob("seed-*/report.json"))
    if not runs:
        raise ConfigError(
            f"report: {', '.join(map(str, folders))} holds no finished run; give run folders, or the folder "
            "of a sweep"
        )
    return runs


def _complete_seeds(reports: Sequence[Report], names: Sequence[str]) -> dict[int, list[Report]]:
    """The reports of each seed that was run once under each name. Raises ConfigError for none."""
    by_seed: dict[int, list[Report]] = {}
    for report in reports:
        by_seed.setdefault(report.seed, []).append(report)
    complete = {}
    for seed, of_seed in sorted(by_seed.items()):
        if sorted(report.name for report in of_seed) == names:
            complete[seed] = of_seed
    if not complete:
        raise ConfigError(
            f"report: no seed was run once under each of the names {names}; their seeds are {sorted(by_seed)}"
        )
    return complete


def join_arms(reports: Sequence[Report]) -> Report:
    """Runs of one seed as one run that has all their arms, named run/arm."""
    if len(reports) == 1:
        return reports[0]
    arms: list[Arm] = []
    downstream: list[Downstream] = []
    planes: list[Robustness] = []
    frontier: list[FrontierPoint] = []
    for report in reports:
        prefix = f"{report.name}/"
        arms += [arm.model_copy(update={"name": prefix + arm.name}) for arm in report.arms]
        downstream += [run.model_copy(update={"arm": prefix + run.arm}) for run in report.downstream]
        planes += [plane.model_copy(update={"arm": prefix + plane.arm}) for plane in report.robustness]
        frontier += [point.model_copy(update={"arm": prefix + point.arm}) for point in report.frontier]
    shared = set.intersection(*(set(report.tasks) for report in reports))
    return reports[0].model_copy(
        update={
            "verdict": None,
            "arms": tuple(arms),
            "downstream": tuple(downstream),
            "robustness": tuple(planes),
            "frontier": tuple(frontier),
            "tasks": tuple(task for task in reports[0].tasks if task in shared),
        }
    )


def _verdicts(reports: Sequence[Report]) -> Iterator[sweep_headline.SeedVerdict]:
    for report in reports:
        if verdict := report.verdict:
            yield sweep_headline.SeedVerdict(
                seed=report.seed, decision=verdict.decision, arm=verdict.arm, policy=verdict.policy
            )


def _arm_names(report: Report) -> tuple[str, ...]:
    return tuple(arm.name for arm in report.arms)


def _arms_over_seeds(table: Table) -> Iterator[ArmOverSeeds]:
    tasks = _Tasks.of(table)
    kl = table.of(kl_of)
    before = table.of(lambda report, i: mean_of(report.arms[i].evaluation, [tasks.focus]))
    others = table.of(lambda report, i: mean_of(report.arms[i].evaluation, tasks.others))
    certified = table.of(certified_within(tasks.focus))
    kept = _after_each(table, lambda finetune: kept_after(finetune, tasks.focus))
    others_kept = _after_each(table, lambda finetune: _mean_after(finetune, tasks.others))
    score = _after_each(table, lambda finetune: _mean_after(finetune, tasks.untrained))
    for i, name in enumerate(table.arms):
        arm = table.reports[0].arms[i]
        yield ArmOverSeeds(
            arm=name,
            family=arm.family,
            settings=arm.settings,
            penalty=arm.penalty,
            beta=arm.beta,
            lam=arm.lam,
            num_seeds=len(table.reports),
            num_steps=arm.summary.num_steps,
            seconds=float(np.mean([report.arms[i].summary.seconds for report in table.reports])),
            kl=interval_or_none(kl[i]),
            before=interval_or_none(before[i]),
            others=interval_or_none(others[i]),
            kept=kept[i],
            others_kept=others_kept[i] if tasks.others else {},
            score=score[i] if tasks.untrained else {},
            certified=interval_or_none(certified[i]),
            coverage=coverage_of(table, name),
        )


@dataclass(frozen=True)
class _Tasks:
    """The measured tasks: the one that lost most, the others that were trained, and those that were not."""

    focus: str
    others: list[str]
    untrained: list[str]

    @classmethod
    def of(cls, table: Table) -> Self:
        trained = set(table.reports[0].tasks)
        measured = {task.task for task in table.reports[0].arms[0].evaluation.rewards}
        return cls(table.focus, sorted(trained - {table.focus}), sorted(measured - trained))


def _from_half(table: Table, finetune: str) -> float:
    """How far from half of its reward a fine-tune left the arms, mean over arms, seeds and prompts: one that
    leaves all or nothing says little of which arm is better."""
    before = table.of(lambda report, i: mean_of(report.arms[i].evaluation, [table.focus])).mean()
    return float(abs(table.of(kept_after(finetune, table.focus)).mean() - before / 2))


def _after_each(table: Table, value: Callable[[str], Value]) -> list[dict[str, Interval | None]]:
    """For each arm, what `value` gives for each fine-tune."""
    values = {finetune: table.of(value(finetune)) for finetune in table.finetunes}
    arms = []
    for i in range(len(table.arms)):
        arms.append({finetune: interval_or_none(of_arms[i]) for finetune, of_arms in values.items()})
    return arms


def _mean_after(finetune: str, tasks: Sequence[str]) -> Value:
    """Reward after a fine-tune, mean over tasks."""
    return lambda report, i: mean_of(end_of(report, i, finetune), tasks)
