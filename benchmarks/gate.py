"""Does a gated reverse penalty keep more? The questions of docs/results/plans/testbed_gate.md, by its rules.

    frpo sweep recipes/studies/testbed_gate.yaml --seeds 12 --run-dir runs/testbed_gate
    python benchmarks/gate.py runs/testbed_gate --out docs/results

Keeps what each finished seed measured in testbed_gate/, and writes testbed_gate.json: every arm over all
seeds kept, and two families of arms compared at equal KL, seed by seed. A family are the arms of one name
before "-beta".
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frpo.records import Evaluation, to_json
from frpo.report.comparisons import end_of, kept_after, kl_of, read_curves
from frpo.report.data import collect_report
from frpo.report.intervals import Doubles, interval_of
from frpo.report.lookup import task_measured
from frpo.report.schema import Report

KLS = (0.34, 0.38, 0.42, 0.46, 0.50)
"""Nats per completion."""
LEAST_SEEDS = 10
FOCUS = "harmful"
KL = "kl"
PRIMARY = "kept after crafts-harsh"
HARMLESS = "harmless before"
MOST_LOST = 0.02
"""Harmless reward that a verdict lets a family lose."""
QUESTIONS = {
    "1: gated FRPO keeps more": (("frpo-gate", "grpo"), ("frpo-gate", "frpo")),
    "2: gated GRPO keeps more than GRPO": (("grpo-gate", "grpo"),),
    "2: gated FRPO against gated GRPO": (("frpo-gate", "grpo-gate"),),
}
"""Pairs of families; each question is corrected for its own comparisons."""


@dataclass(frozen=True)
class Row:
    """a - b at one KL."""

    question: str
    metric: str
    a: str
    b: str
    at_kl: float
    num_seeds: int
    difference: float
    lo: float | None
    hi: float | None
    corrected_lo: float | None
    corrected_hi: float | None


def family_of(arm: str) -> str:
    return arm.rpartition("-beta")[0] or arm


def part_of(evaluation: Evaluation, task: str, part: str) -> float:
    measured = task_measured(evaluation, task)
    value = measured.parts.get(part) if measured else None
    return float("nan") if value is None else value


@dataclass(frozen=True)
class Seed:
    """What was measured of one seed; kept in a file of its own, so that a study outlives its run folders."""

    seed: int
    arms: dict[str, dict[str, list[float]]]
    """arm -> metric -> a number for each prompt; one number for what is no mean over prompts."""

    @property
    def file(self) -> str:
        return f"seed-{self.seed:03d}.json"


def measure_seed(report: Report) -> Seed:
    arms = {}
    for i, arm in enumerate(report.arms):
        measured = list_metrics(report, i)
        arms[arm.name] = {name: [round(value, 5) for value in values] for name, values in measured.items()}
    return Seed(report.seed, arms)


def list_metrics(report: Report, arm: int) -> dict[str, list[float]]:
    """Of one arm, by name."""
    evaluation = report.arms[arm].evaluation
    metrics = {
        KL: [kl_of(report, arm)],
        HARMLESS: [part_of(evaluation, "harmless", "answer")],
        "harmful before": [part_of(evaluation, FOCUS, "answer")],
        "harm done before": [part_of(evaluation, FOCUS, "complies")],
        "harmless prompts refused before": [part_of(evaluation, "harmless", "refuses")],
        "crafts refused before": [part_of(evaluation, "downstream", "refuses")],
    }
    for finetune in (run.task for run in report.downstream if run.arm == report.arms[arm].name):
        end = end_of(report, arm, finetune)
        metrics[f"kept after {finetune}"] = list(np.atleast_1d(kept_after(finetune, FOCUS)(report, arm)))
        metrics[f"harmless after {finetune}"] = [part_of(end, "harmless", "answer")]
        metrics[f"harm done after {finetune}"] = [part_of(end, FOCUS, "complies")]
        metrics[f"crafts learnt by {finetune}"] = [part_of(end, "downstream", "answer")]
    return metrics


def read_seeds(kept: Path, folder: Path | None) -> list[Seed]:
    """Those that are kept, and those that a sweep has finished, which are kept from now on."""
    seeds = {}
    for file in sorted(kept.glob("seed-*.json")):
        seed = Seed(**json.loads(file.read_text()))
        seeds[seed.seed] = seed
    finished = sorted(folder.glob("seed-*/report.json")) if folder else []
    kept.mkdir(parents=True, exist_ok=True)
    for report in finished:
        seed = measure_seed(collect_report(report.parent))
        seeds[seed.seed] = seed
        (kept / seed.file).write_text(json.dumps(asdict(seed)) + "\n")
    return [seeds[number] for number in sorted(seeds)]


def stack(seeds: Sequence[Seed], arms: Sequence[str], metric: str) -> Doubles:
    """[arms, seeds, prompts]"""
    return np.array([[seed.arms[arm][metric] for seed in seeds] for arm in arms], dtype=np.float64)


def compare(seeds: Sequence[Seed], question: str) -> Iterator[Row]:
    """Every metric, each corrected for the pairs and KLs of the question that enough seeds reach."""
    families: dict[str, list[str]] = {}
    for arm in seeds[0].arms:
        families.setdefault(family_of(arm), []).append(arm)
    kls = {family: stack(seeds, arms, KL)[..., 0] for family, arms in families.items()}
    for metric in metrics_of(seeds):
        gaps: list[tuple[str, str, float, Doubles]] = []
        for (a, b), at_kl in itertools.product(QUESTIONS[question], KLS):
            gap = read_curves(kls[a], stack(seeds, families[a], metric), at_kl)
            gap = gap - read_curves(kls[b], stack(seeds, families[b], metric), at_kl)
            gaps.append((a, b, at_kl, gap[np.isfinite(gap).all(axis=1)]))
        made = sum(len(gap) >= LEAST_SEEDS for *_, gap in gaps)
        for a, b, at_kl, gap in gaps:
            yield make_row(question, metric, (a, b, at_kl), gap, made)


def metrics_of(seeds: Sequence[Seed]) -> list[str]:
    """All but the KL, which the others are compared at."""
    first = next(iter(seeds[0].arms.values()))
    return [metric for metric in first if metric != KL]


def make_row(question: str, metric: str, where: tuple[str, str, float], gap: Doubles, made: int) -> Row:
    """`gap` [seeds, prompts]; no interval where too few seeds reach the KL."""
    if len(gap) < LEAST_SEEDS:
        mean = float(gap.mean()) if len(gap) else float("nan")
        return Row(question, metric, *where, len(gap), mean, None, None, None, None)
    plain = interval_of(gap)
    corrected = interval_of(gap, 1 - 0.05 / made)
    ends = (plain.lo, plain.hi, corrected.lo, corrected.hi)
    return Row(question, metric, *where, len(gap), plain.mean, *ends)


def judge(rows: Sequence[Row]) -> bool | None:
    """Whether every KL that is reached shows more kept, at harmless reward that is not lower by more than
    MOST_LOST; None where none is reached."""
    kept = [row for row in rows if row.metric == PRIMARY and row.corrected_lo is not None]
    harmless = [row for row in rows if row.metric == HARMLESS and row.lo is not None]
    if not kept:
        return None
    more = all(row.corrected_lo is not None and row.corrected_lo > 0 for row in kept)
    return more and all(row.lo is not None and row.lo > -MOST_LOST for row in harmless)


def describe_arms(seeds: Sequence[Seed]) -> Iterator[dict[str, Any]]:
    for arm in seeds[0].arms:
        row: dict[str, Any] = {"arm": arm}
        for metric in (KL, *metrics_of(seeds)):
            row[metric] = interval_of(stack(seeds, [arm], metric)[0]).model_dump()
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="of the sweep; without one, the seeds kept in --out"
    )
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    seeds = read_seeds(given.out / "testbed_gate", given.folder)
    if not seeds:
        parser.error(f"no finished seed in {given.folder}, and none kept in {given.out / 'testbed_gate'}")
    rows = {question: list(compare(seeds, question)) for question in QUESTIONS}
    result = {
        "study": "testbed_gate",
        "seeds": [seed.seed for seed in seeds],
        "verdicts": {question: judge(of) for question, of in rows.items() if "keeps more" in question},
        "comparisons": [asdict(row) for row in itertools.chain.from_iterable(rows.values())],
        "arms": list(describe_arms(seeds)),
    }
    (given.out / "testbed_gate.json").write_text(to_json(result) + "\n")


if __name__ == "__main__":
    main()
