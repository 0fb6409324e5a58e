"""What a study measured, a file for each seed, so that it outlives its run folders and goes on elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from frpo.records import Evaluation
from frpo.report.comparisons import read_curves
from frpo.report.data import collect_report
from frpo.report.intervals import Doubles
from frpo.report.lookup import task_measured
from frpo.report.schema import Report

KL = "kl"
"""Metric of every arm: KL(policy || reference) before any fine-tune, nats per completion."""

Metrics = Mapping[str, Sequence[float]]
"""Of one arm, by name: a number for each held-out prompt; one number for what is no mean over prompts."""
Measure = Callable[[Path, Report, int], Metrics]
"""What a study wants of one arm, given the seed's run folder, its report and the arm's index."""


@dataclass(frozen=True)
class Seed:
    seed: int
    arms: dict[str, dict[str, list[float]]]
    """arm -> metric -> numbers, as in Metrics"""

    def family(self, name: str, metric: str = KL) -> list[str]:
        """Its arms, those of one name before "-beta" or "-kl" and a number, of which that was measured: not
        every sweep makes every fine-tune."""
        return [arm for arm, measured in self.arms.items() if family_of(arm) == name and metric in measured]

    @property
    def file(self) -> str:
        return f"seed-{self.seed:03d}.json"


def family_of(arm: str) -> str:
    return re.sub(r"-(beta|kl)[\d.]+$", "", arm)


def read_seeds(kept: Path, folder: Path | None, measure: Measure, prefix: str = "") -> list[Seed]:
    """Those that are kept, and those that the sweep in `folder` has finished, which are kept from now on. Two
    sweeps on the same seeds give the arms of both; `prefix` tells apart arms of one name."""
    seeds = {}
    for file in sorted(kept.glob("seed-*.json")):
        seed = Seed(**json.loads(file.read_text()))
        seeds[seed.seed] = seed
    finished = sorted(folder.glob("seed-*/report.json")) if folder else []
    kept.mkdir(parents=True, exist_ok=True)
    for report in finished:
        seed = measure_seed(report.parent, measure, prefix)
        before = seeds.get(seed.seed, Seed(seed.seed, {}))
        seeds[seed.seed] = Seed(seed.seed, {**before.arms, **seed.arms})
        (kept / seed.file).write_text(json.dumps(asdict(seeds[seed.seed])) + "\n")
    return [seeds[number] for number in sorted(seeds)]


def measure_seed(run: Path, measure: Measure, prefix: str) -> Seed:
    report = collect_report(run)
    arms = {}
    for i, arm in enumerate(report.arms):
        metrics = measure(run, report, i)
        rounded = {name: [round(value, 5) for value in values] for name, values in metrics.items()}
        arms[prefix + arm.name] = rounded
    return Seed(report.seed, arms)


def part_of(evaluation: Evaluation, task: str, part: str) -> float:
    """Mean of one reward over one task; nan where it was not measured."""
    measured = task_measured(evaluation, task)
    value = measured.parts.get(part) if measured else None
    return float("nan") if value is None else value


def metrics_of(seeds: Sequence[Seed]) -> list[str]:
    """All but the KL, which the others are compared at."""
    first = next(iter(seeds[0].arms.values()))
    return [metric for metric in first if metric != KL]


def stack(seeds: Sequence[Seed], arms: Sequence[str], metric: str) -> Doubles:
    """[arms, seeds, prompts]"""
    return np.array([[seed.arms[arm][metric] for seed in seeds] for arm in arms], dtype=np.float64)


def curve_of(seeds: Sequence[Seed], family: str, metric: str, at_kl: float) -> Doubles:
    """[seeds, prompts]; nan for a seed whose arms do not reach the KL."""
    arms = seeds[0].family(family, metric)
    return read_curves(stack(seeds, arms, KL)[..., 0], stack(seeds, arms, metric), at_kl)
