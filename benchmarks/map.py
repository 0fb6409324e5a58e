"""Where FRPO pays on the testbed: GRPO and three lambdas, steered to one KL to the reference, in several
settings.

    python benchmarks/map.py runs/map --seeds 6 --out docs/results

Each setting is a sweep of its own (`frpo sweep`), kept in its folder; a second call goes on where the first
was stopped, and leaves out the settings that testbed_map.json holds already. Writes testbed_map.json (the
studies' format) and testbed_map.png. Where a controller of few steps leaves the methods at unlike KLs, each
is steered to several and compared where their curves overlap. Settings: a tight and a roomy KL budget with
the reverse penalty, the tight one with k3, a base that fails rarely, a reward with a risky and a safe way
(recipes/studies/risky.py), a base that refuses rarely, a third of the steps, twice as many of half the size,
and larger groups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = "recipes/studies/testbed_k3.yaml"
RISKY = 'rewards=[{kind: function, name: answer, function: "recipes/studies/risky.py:risky"}]'


@dataclass(frozen=True)
class Setting:
    """One row of the map."""

    label: str
    kls: tuple[float, ...]
    """To the reference, nats, that the arms are steered to."""
    penalty: str = "reverse"
    sets: tuple[str, ...] = ()
    """What is otherwise than in the recipe."""


SETTINGS = {
    "tight": Setting("KL 0.3", (0.3,)),
    "tight-k3": Setting("KL 0.3, k3", (0.3,), "k3"),
    "roomy": Setting("KL 0.6", (0.6,)),
    "rare": Setting("failures rare, KL 0.1", (0.1,), sets=("base.data.0.path=testbed:base?refusal=0.9",)),
    "risky": Setting("risky and safe way, KL 0.6", (0.6,), sets=(RISKY,)),
    "hard": Setting(
        "base refuses rarely, KL 0.6", (0.6,), sets=("base.data.0.path=testbed:base?refusal=0.25",)
    ),
    "short": Setting("30 steps, KL 0.2 to 0.5", (0.2, 0.3, 0.5), sets=("learner.num_steps=30",)),
    "groups": Setting(
        "groups of 16, KL 0.3", (0.3,), sets=("rollout.group_size=16", "rollout.prompts_per_step=12")
    ),
    "small-steps": Setting(
        "200 smaller steps, KL 0.3", (0.3,), sets=("learner.num_steps=200", "learner.learning_rate=5.0e-4")
    ),
}
METHODS = {
    "grpo": "kind: grpo",
    "frpo-lam2": "kind: frpo, lam: 2",
    "frpo-lam0.5": "kind: frpo, lam: 0.5",
    "frpo-lam0.2": "kind: frpo, lam: 0.2",
}
METRICS = ("kept after crafts-harsh", "kept after crafts-gentle", "certified", "other tasks")


def run_sweep(folder: Path, seeds: int, setting: Setting) -> dict[str, Any]:
    """sweep.json of one setting."""
    sets = (f"arms=[{', '.join(arms_of(setting))}]", *setting.sets)
    words = itertools.chain.from_iterable(("--set", text) for text in sets)
    command = [sys.executable, "-m", "frpo", "sweep", RECIPE, "--seeds", str(seeds)]
    subprocess.run([*command, "--run-dir", str(folder), *words], check=True)
    sweep: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return sweep


def arms_of(setting: Setting) -> Iterator[str]:
    """In YAML: every method steered to every KL."""
    for (name, estimator), kl in itertools.product(METHODS.items(), setting.kls):
        arm = name if len(setting.kls) == 1 else f"{name}-kl{kl}"
        objective = f"estimator: {{{estimator}}}, penalty: {setting.penalty}, beta: 0.2, target_kl: {kl}"
        yield f"{{name: {arm}, objective: {{{objective}}}}}"


def choose_comparisons(sweep: dict[str, Any], kls: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row per metric and lambda, `a` the lambda's arm: of two curves, the middle of their overlap."""
    rows = sweep["comparisons"]
    if len(kls) == 1:  # steered to one KL; how near they came to each other stands in kl_difference
        return [{**row, "matched_by": "kl", "at_kl": kls[0]} for row in rows if row["matched_by"] == "steps"]
    arm_of = {arm["family"]: arm["arm"].rsplit("-kl", 1)[0] for arm in sweep["arms"]}
    curves: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["matched_by"] == "kl" and arm_of[row["b"]] == "grpo":
            curves.setdefault((row["metric"], row["a"], row["b"]), []).append(row)
    chosen = []
    for (_, a, b), curve in curves.items():
        chosen.append({**curve[len(curve) // 2], "a": arm_of[a], "b": arm_of[b]})
    return chosen


def draw_map(comparisons: list[dict[str, Any]], out: Path) -> None:
    """A metric a panel, a setting a row, a lambda a colour."""
    from matplotlib.figure import Figure

    measured = {row["setting"] for row in comparisons}
    done = [name for name in SETTINGS if name in measured]
    by_place = {(row["setting"], row["metric"], row["a"]): row for row in reversed(comparisons)}
    figure = Figure(figsize=(3 * len(METRICS), 0.7 * len(done) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, metric in zip(axes, METRICS, strict=True):
        for i, name in enumerate(done):
            for j, arm in enumerate(list(METHODS)[1:]):
                row = by_place.get((name, metric, arm))
                if row:
                    axis.errorbar(
                        row["difference"],
                        -(i + 0.2 * (j - 1)),
                        xerr=bars_of(row),
                        fmt="o",
                        color=f"C{j}",
                        label=arm.removeprefix("frpo-lam") if i == 0 else None,
                        capsize=2,
                    )
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_title(metric)
        axis.set_xlabel("FRPO - GRPO")
    axes[0].set_yticks([-i for i in range(len(done))], [SETTINGS[name].label for name in done])
    axes[0].set_ylim(0.5 - len(done), 0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), title="λ", loc="outside right center")
    figure.savefig(out, dpi=110)


def bars_of(row: dict[str, Any]) -> list[list[float]] | None:
    """Below and above the difference; None from too few seeds for an interval."""
    if row["lo"] is None:
        return None
    return [[row["difference"] - row["lo"]], [row["hi"] - row["difference"]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    kept = given.out / "testbed_map.json"
    result: dict[str, Any] = {"study": "testbed_map", "seeds": [], "comparisons": [], "arms": []}
    if kept.is_file():
        result = json.loads(kept.read_text())
    for name, setting in SETTINGS.items():
        if any(arm["setting"] == name for arm in result["arms"]):
            continue
        sweep = run_sweep(given.folder / name, given.seeds, setting)
        result |= {"seeds": sweep["seeds"], "intervals": sweep["intervals"]}
        for arm in sweep["arms"]:
            del arm["coverage"]
            result["arms"].append({"setting": name, **arm})
        for row in choose_comparisons(sweep, setting.kls):
            result["comparisons"].append({"setting": name, "label": setting.label, **row})
        kept.write_text(json.dumps(result, indent=1) + "\n")
    draw_map(result["comparisons"], given.out / "testbed_map.png")


if __name__ == "__main__":
    main()
