"""Does a loop that runs ahead still learn? GRPO and FRPO on the testbed at several staleness limits, weights
changed under running completions or after them, against the loop that takes turns, seed by seed.

    python benchmarks/staleness.py runs/staleness --seeds 10 --out docs/results

Each setting and pair of seeds is a sweep of its own (`frpo sweep`); what a seed measured is kept in
testbed_staleness/, and a second call runs only what is missing there, on any machine. Writes
testbed_staleness.json and .png: of every setting and arm the mean over seeds of what is measured, and the
mean of its paired difference to the same seed without staleness, with the intervals of every sweep
(frpo/report/intervals.py), and with those that hold for all settings and arms of a metric at once.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml
from study_parts.seeds import KL, Metrics, Seed, stack
from study_parts.settings import Setting, measure_settings
from study_parts.testbed import FOCUS

from frpo.metrics import read_steps
from frpo.records import to_json
from frpo.report.comparisons import certified_within, kept_after, kl_of, mean_of
from frpo.report.intervals import interval_of
from frpo.report.schema import Report
from frpo.report.student import CONFIDENCE

RECIPE = "recipes/studies/testbed_k3.yaml"
HARSH = "crafts-harsh"
CUTS = ("learner.num_steps=60", "downstream.0.num_steps=50", "downstream.0.marks=[]")
"""Shorter than the recipe where the question allows."""
ARMS = (
    "{name: grpo, objective: {estimator: {kind: grpo}, beta: 0.1}}",
    "{name: frpo, objective: {estimator: {kind: frpo, lam: 0.5}, beta: 0.3}}",
)


def make_setting(staleness: int, in_flight: bool) -> Setting:
    way = "" if in_flight else "-drained"
    asked = (f"rollout.staleness={staleness}", f"rollout.in_flight={str(in_flight).lower()}")
    return Setting(f"staleness-{staleness}{way}", (*CUTS, f"arms=[{', '.join(ARMS)}]", *asked))


SETTINGS = tuple(itertools.starmap(make_setting, [(0, True), *itertools.product((1, 2, 4), (True, False))]))
CORRECTED = 1 - (1 - CONFIDENCE) / (len(ARMS) * len(SETTINGS[1:]))
"""Confidence of each difference of a metric, so that all hold at once (Bonferroni)."""
METRICS = {
    "reward": "mean reward of the trained tasks",
    "kl": "KL to the reference, nats",
    "kept": "reward kept after the harsh fine-tune",
    "certified": "reward certified within 0.5 nats",
    "stale_kl": "KL(policy that drew || learner), nats a token",
    "staleness": "mean staleness of a token, updates",
    "capped": "share of tokens above the cap",
}


def list_metrics(run: Path, report: Report, number: int) -> Metrics:
    arm = report.arms[number]
    steps = read_steps(run, f"rlhf/{arm.name}")
    stale = [row.update.stale_kl for row in steps if row.update.stale_kl is not None]
    return {
        "reward": [mean_of(arm.evaluation, report.tasks)],
        KL: [kl_of(report, number)],
        "kept": list(np.atleast_1d(kept_after(HARSH, FOCUS)(report, number))),
        "certified": list(np.atleast_1d(certified_within(FOCUS)(report, number))),
        "stale_kl": [mean(stale) if stale else 0.0],
        "staleness": [mean(row.batch.staleness for row in steps)],
        "capped": [mean(row.update.capped_share for row in steps)],
    }


def tabulate(seeds: Sequence[Seed]) -> list[dict[str, Any]]:
    """Of the seeds that every setting has."""
    names = list(itertools.product([setting.name for setting in SETTINGS], ("grpo", "frpo")))
    wanted = {f"{setting}/{arm}" for setting, arm in names}
    whole = [seed for seed in seeds if wanted <= seed.arms.keys()]
    rows = []
    for setting, arm in names:
        row: dict[str, Any] = {"setting": setting, "arm": arm, "seeds": len(whole)}
        for metric in METRICS:
            own, base = stack(whole, [f"{setting}/{arm}", f"{SETTINGS[0].name}/{arm}"], metric)
            row[metric] = interval_of(own).model_dump()
            row[f"{metric} - staleness 0"] = interval_of(own - base).model_dump()
            row[f"{metric} - staleness 0, corrected"] = interval_of(own - base, CORRECTED).model_dump()
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
            axis.plot(gap["mean"], at, "o", color=f"C{arm}", markersize=5)
            for each, width in ((gap, 2.4), (row[f"{metric} - staleness 0, corrected"], 0.8)):
                axis.plot([each["lo"], each["hi"]], [at, at], color=f"C{arm}", lw=width)
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_title(METRICS[metric], fontsize=9)
    axes[0].set_yticks([-i - 0.125 for i in range(len(ahead))], ahead)
    figure.suptitle(
        "Difference to the same seeds without staleness (blue GRPO, orange FRPO; thin: all at once)",
        fontsize=10,
    )
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    kept = given.out / "testbed_staleness"
    numbers = range(recipe["seed"], recipe["seed"] + given.seeds)
    seeds = measure_settings(RECIPE, SETTINGS, numbers, given.folder, kept, list_metrics)
    rows = tabulate(seeds)
    result = {
        "study": "testbed_staleness",
        "recipe": recipe["name"],
        "cuts": CUTS,
        "metrics": METRICS,
        "rows": rows,
    }
    (given.out / "testbed_staleness.json").write_text(to_json(result) + "\n")
    draw(rows, given.out / "testbed_staleness.png")


if __name__ == "__main__":
    main()
