"""Does a loop that runs ahead still learn? GRPO and FRPO on the testbed at several staleness limits, weights
changed under running completions or after them, against the loop that takes turns, seed by seed.

    python benchmarks/staleness.py runs/staleness --seeds 10 --out docs/results

Each setting is a sweep of its own (`frpo sweep`), kept in its folder; a second call goes on where the first
was stopped. Writes testbed_staleness.json and testbed_staleness.png: of every setting and arm the mean over
seeds of what is measured, and the mean of its paired difference to the same seed without staleness, each with
a 95 % interval of Student's t over the seeds (arXiv-free arithmetic: mean +- t s / sqrt(n)).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from scipy import stats

from frpo.metrics import read_steps
from frpo.report.comparisons import certified_within
from frpo.report.data import collect_report
from frpo.report.schema import Report

RECIPE = "recipes/studies/testbed_k3.yaml"
FOCUS = "harmful"
HARSH = "crafts-harsh"
CUTS = ("learner.num_steps=60", "downstream.0.num_steps=50", "downstream.0.marks=[]")
"""Shorter than the recipe where the question allows."""
ARMS = (
    "{name: grpo, objective: {estimator: {kind: grpo}, beta: 0.1}}",
    "{name: frpo, objective: {estimator: {kind: frpo, lam: 0.5}, beta: 0.3}}",
)


@dataclass(frozen=True)
class Setting:
    staleness: int
    in_flight: bool = True

    @property
    def name(self) -> str:
        way = "" if self.in_flight else "-drained"
        return f"staleness-{self.staleness}{way}"


SETTINGS = (
    Setting(0),
    *(Setting(staleness, in_flight) for staleness, in_flight in itertools.product((1, 2, 4), (True, False))),
)


@dataclass(frozen=True)
class Sample:
    """One arm of one seed of one setting."""

    setting: str
    arm: str
    seed: int
    values: dict[str, float]


METRICS = {
    "reward": "mean reward of the trained tasks",
    "kl": "KL to the reference, nats",
    "kept": "reward kept after the harsh fine-tune",
    "certified": "reward certified within 0.5 nats",
    "stale_kl": "KL(policy that drew || learner), nats a token",
    "staleness": "mean staleness of a token, updates",
    "capped": "share of tokens above the cap",
}


def run_sweep(folder: Path, seeds: int, setting: Setting) -> None:
    flying = str(setting.in_flight).lower()
    asked = (
        f"rollout.staleness={setting.staleness}",
        f"rollout.in_flight={flying}",
        f"arms=[{', '.join(ARMS)}]",
    )
    command = [sys.executable, "-m", "frpo", "sweep", RECIPE, "--seeds", str(seeds), "--run-dir", str(folder)]
    for assignment in (*CUTS, *asked):
        command += ["--set", assignment]
    subprocess.run(command, check=True)


def read_samples(folder: Path, setting: Setting) -> Iterator[Sample]:
    for run in sorted(folder.glob("seed-*")):
        report = collect_report(run)
        for number, arm in enumerate(report.arms):
            yield Sample(setting.name, arm.name, report.seed, measure(run, report, number))


def measure(run: Path, report: Report, number: int) -> dict[str, float]:
    arm = report.arms[number]
    kept = next(kept for kept in arm.kept if (kept.downstream, kept.task) == (HARSH, FOCUS))
    divergence = arm.evaluation.kl_reference
    trained = [task.reward.mean for task in arm.evaluation.rewards if task.task in report.tasks]
    steps = read_steps(run, f"rlhf/{arm.name}")
    stale = [row.update.stale_kl for row in steps if row.update.stale_kl is not None]
    return {
        "reward": mean(trained),
        "kl": divergence.mean if divergence else math.nan,
        "kept": kept.after.mean,
        "certified": certified_within(FOCUS)(report, number),
        "stale_kl": mean(stale) if stale else 0.0,
        "staleness": mean(row.batch.staleness for row in steps),
        "capped": mean(row.update.capped_share for row in steps),
    }


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Mean, and half of its 95 % interval."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return {"mean": mean(values), "lo": mean(values) - half, "hi": mean(values) + half}


def tabulate(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    rows = []
    names = dict.fromkeys((sample.setting, sample.arm) for sample in samples)
    by_place = {(sample.setting, sample.arm, sample.seed): sample.values for sample in samples}
    for setting, arm in names:
        seeds = [seed for of, name, seed in by_place if (of, name) == (setting, arm)]
        row: dict[str, Any] = {"setting": setting, "arm": arm, "seeds": len(seeds)}
        for metric in METRICS:
            own = [by_place[setting, arm, seed][metric] for seed in seeds]
            base = [by_place[SETTINGS[0].name, arm, seed][metric] for seed in seeds]
            gaps = [mine - before for mine, before in zip(own, base, strict=True)]
            row[metric] = spread_of(own)
            row[f"{metric} - staleness 0"] = spread_of(gaps)
        rows.append(row)
    return rows


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """A metric a panel, a setting a row, an arm a colour: differences to staleness 0."""
    from matplotlib.figure import Figure

    shown = ("reward", "kl", "kept", "certified")
    ahead = [setting.name for setting in SETTINGS[1:]]
    figure = Figure(figsize=(3.2 * len(shown), 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, metric in zip(axes, shown, strict=True):
        for row in rows:
            if row["setting"] not in ahead:
                continue
            gap = row[f"{metric} - staleness 0"]
            arm = ("grpo", "frpo").index(row["arm"])
            at = -(ahead.index(row["setting"]) + 0.25 * arm)
            error = [[gap["mean"] - gap["lo"]], [gap["hi"] - gap["mean"]]]
            axis.errorbar(gap["mean"], at, xerr=error, fmt="o", color=f"C{arm}", capsize=2)
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_title(METRICS[metric], fontsize=9)
    axes[0].set_yticks([-i - 0.125 for i in range(len(ahead))], ahead)
    figure.suptitle("Difference to the same seeds without staleness (blue GRPO, orange FRPO)", fontsize=10)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    samples: list[Sample] = []
    for setting in SETTINGS:
        folder = given.folder / setting.name
        run_sweep(folder, given.seeds, setting)
        samples += read_samples(folder, setting)
    rows = tabulate(samples)
    recipe = yaml.safe_load(Path(RECIPE).read_text())["name"]
    result = {"study": "testbed_staleness", "recipe": recipe, "cuts": CUTS, "metrics": METRICS, "rows": rows}
    (given.out / "testbed_staleness.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, given.out / "testbed_staleness.png")


if __name__ == "__main__":
    main()
