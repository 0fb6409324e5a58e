"""Where does a gated penalty keep more? Settings in which FRPO had little to gain, by the rules of
docs/results/plans/testbed_gate_map.md.

    python benchmarks/gate_map.py runs/gate_map --seeds 12 --out docs/results

Sweeps of two seeds each; what a seed measured is kept in testbed_gate_map/, and a second call runs only what
is missing there. Writes testbed_gate_map.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
from study_parts.contrasts import LEAST_SEEDS, Contrast, Row, Side, compare, middle_kl
from study_parts.seeds import Seed
from study_parts.settings import Setting, measure_settings
from study_parts.testbed import HARMLESS, list_metrics

from frpo.records import to_json
from frpo.report.drawing import PAPER, add_legend, colour_of, save_png

RECIPE = "recipes/studies/testbed_k3.yaml"
FIRST_SEED = 64
HARSH = (
    "downstream=[{name: crafts-harsh, num_steps: 200, batch_size: 32, learning_rate: 1.0e-3, "
    "data: [{path: 'testbed:downstream', completion: completion, task_column: task}]}]"
)
SHORTER = ("certify=null", HARSH)
WEIGHTS = {"grpo": (0.7, 0.4, 0.2), "frpo": (1.7, 1.0, 0.6), "frpo-gate": (6, 3, 1.5)}
"""Of the penalty; those of testbed_gate."""
LIGHTER = {"grpo": (0.2, 0.1, 0.03), "frpo": (0.6, 0.3, 0.1), "frpo-gate": (2, 0.8, 0.3)}
"""For few steps, and for a base that refuses rarely: both stay nearer to it under the same weight."""
HEAVIER = {"grpo": (2, 1, 0.5), "frpo": (5, 2.5, 1.2), "frpo-gate": (12, 6, 3)}
"""For a base that refuses nearly always."""
RIVALS = ("grpo", "frpo")
METRICS = ("kept after crafts-harsh", "harmless after crafts-harsh", HARMLESS)


def make_setting(name: str, weights: dict[str, tuple[float, ...]], *sets: str) -> Setting:
    arms: list[str] = []
    for family, betas in weights.items():
        arms += [make_arm(family, beta) for beta in betas]
    return Setting(name, (*SHORTER, *sets, f"arms=[{', '.join(arms)}]"))


def make_arm(family: str, beta: float) -> str:
    """In YAML."""
    estimator = "kind: grpo" if family == "grpo" else "kind: frpo, lam: 0.5"
    objective = f"estimator: {{{estimator}}}, penalty: reverse, beta: {beta}"
    if family.endswith("gate"):
        objective += ", gate: {tasks: [harmful]}, beta_of: {harmless: 0.5}"
    return f"{{name: {family}-beta{beta}, objective: {{{objective}}}}}"


SETTINGS = (
    make_setting("rare", HEAVIER, "base.data.0.path=testbed:base?refusal=0.9"),
    make_setting("hard", LIGHTER, "base.data.0.path=testbed:base?refusal=0.25"),
    make_setting("short", LIGHTER, "learner.num_steps=30"),
    make_setting("groups", WEIGHTS, "rollout.group_size=16", "rollout.prompts_per_step=12"),
)
LABELS = {
    "rare": "failures rare",
    "hard": "base refuses rarely",
    "short": "30 steps",
    "groups": "groups of 16, half the prompts",
}


def answer(seeds: Sequence[Seed], setting: str) -> Iterator[Row]:
    """Gated FRPO against the two others, each at the middle of what both reach; corrected within a setting
    and metric."""
    for metric, rival in itertools.product(METRICS, RIVALS):
        a, b = f"{setting}/frpo-gate", f"{setting}/{rival}"
        contrast = Contrast(metric, Side(a, metric, "frpo-gate"), Side(b, metric, rival))
        yield from compare(seeds, setting, [contrast], [middle_kl(seeds, a, b)], made=len(RIVALS))


def save_picture(rows: Sequence[Row], file: Path) -> None:
    """A metric a panel, a setting a row, a rival a colour; mean and corrected interval."""
    with plt.rc_context(PAPER):
        figure, grid = plt.subplots(1, len(METRICS), figsize=(3.6 * len(METRICS), 3), sharey=True)
        for axes, metric in zip(grid, METRICS, strict=True):
            for row in rows:
                if row.metric == metric and row.corrected_lo is not None and row.corrected_hi is not None:
                    rival = RIVALS.index(row.b)
                    at = -list(LABELS).index(row.question) - 0.25 * rival
                    axes.plot([row.corrected_lo, row.corrected_hi], [at, at], color=colour_of(rival))
                    label = f"less {row.b}" if row.question == SETTINGS[0].name else None
                    axes.plot([row.difference], [at], "o", color=colour_of(rival), label=label)
            axes.axvline(0, color="grey", linewidth=0.8)
            axes.set(title=metric, xlabel="gated FRPO less the other")
        grid[0].set_yticks([-place for place in range(len(LABELS))], list(LABELS.values()))
        figure.tight_layout()
        add_legend(grid[0])
        save_png(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=12, help=f"at least {LEAST_SEEDS} for an interval")
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    numbers = range(FIRST_SEED, FIRST_SEED + given.seeds)
    kept = given.out / "testbed_gate_map"
    seeds = measure_settings(RECIPE, SETTINGS, numbers, given.folder, kept, list_metrics)
    rows: list[Row] = []
    for setting in SETTINGS:
        rows += answer([seed for seed in seeds if setting.has(seed)], setting.name)
    result = {
        "study": "testbed_gate_map",
        "seeds": [seed.seed for seed in seeds],
        "settings": LABELS,
        "comparisons": [asdict(row) for row in rows],
    }
    (given.out / "testbed_gate_map.json").write_text(to_json(result) + "\n")
    save_picture(rows, given.out / "testbed_gate_map.png")


if __name__ == "__main__":
    main()
