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
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = "recipes/studies/testbed_k3.yaml"
RISKY = 'rewards=[{kind: function, name: answer, function: "recipes/studies/risky.py:risky"}]'
SETTINGS: dict[str, tuple[str, tuple[float, ...], str, tuple[str, ...]]] = {
    "tight": ("KL 0.3", (0.3,), "reverse", ()),
    "tight-k3": ("KL 0.3, k3", (0.3,), "k3", ()),
    "roomy": ("KL 0.6", (0.6,), "reverse", ()),
    "rare": ("failures rare, KL 0.1", (0.1,), "reverse", ("base.data.0.path=testbed:base?refusal=0.9",)),
    "risky": ("risky and safe way, KL 0.6", (0.6,), "reverse", (RISKY,)),
    "hard": (
        "base refuses rarely, KL 0.6",
        (0.6,),
        "reverse",
        ("base.data.0.path=testbed:base?refusal=0.25",),
    ),
    "short": ("30 steps, KL 0.2 to 0.5", (0.2, 0.3, 0.5), "reverse", ("learner.num_steps=30",)),
    "groups": (
        "groups of 16, KL 0.3",
        (0.3,),
        "reverse",
        ("rollout.group_size=16", "rollout.prompts_per_step=12"),
    ),
    "small-steps": (
        "200 smaller steps, KL 0.3",
        (0.3,),
        "reverse",
        ("learner.num_steps=200", "learner.learning_rate=5.0e-4"),
    ),
}
METHODS = {
    "grpo": "kind: grpo",
    "frpo-lam2": "kind: frpo, lam: 2",
    "frpo-lam0.5": "kind: frpo, lam: 0.5",
    "frpo-lam0.2": "kind: frpo, lam: 0.2",
}
METRICS = ("kept after crafts-harsh", "kept after crafts-gentle", "certified", "other tasks")


def sweep(
    folder: Path, seeds: int, kls: tuple[float, ...], penalty: str, sets: tuple[str, ...]
) -> dict[str, Any]:
    arms = ", ".join(
        f"{{name: {name if len(kls) == 1 else f'{name}-kl{kl}'}, objective: {{estimator: {{{estimator}}}, penalty: {penalty}, "
        f"beta: 0.2, target_kl: {kl}}}}}"
        for name, estimator in METHODS.items()
        for kl in kls
    )
    words = [w for s in (f"arms=[{arms}]", *sets) for w in ("--set", s)]
    command = [
        sys.executable,
        "-m",
        "frpo",
        "sweep",
        RECIPE,
        "--seeds",
        str(seeds),
        "--run-dir",
        str(folder),
        *words,
    ]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


def comparisons(found: dict[str, Any], kls: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row per metric and lambda, `a` the lambda's arm: of two curves, the middle of their overlap."""
    rows = found["comparisons"]
    if len(kls) == 1:  # steered to one KL; how near they came to each other stands in kl_difference
        return [{**c, "matched_by": "kl", "at_kl": kls[0]} for c in rows if c["matched_by"] == "steps"]
    arm_of = {a["family"]: a["arm"].rsplit("-kl", 1)[0] for a in found["arms"]}
    curves: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for c in rows:
        if c["matched_by"] == "kl" and arm_of[c["b"]] == "grpo":
            curves.setdefault((c["metric"], c["a"], c["b"]), []).append(c)
    return [{**c[len(c) // 2], "a": arm_of[a], "b": arm_of[b]} for (_, a, b), c in curves.items()]


def draw(comparisons: list[dict[str, Any]], out: Path) -> None:
    from matplotlib.figure import Figure

    done = [name for name in SETTINGS if any(c["setting"] == name for c in comparisons)]
    figure = Figure(figsize=(3 * len(METRICS), 0.7 * len(done) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, metric in zip(axes, METRICS, strict=True):
        for i, name in enumerate(done):
            for j, arm in enumerate(list(METHODS)[1:]):
                row = next(
                    (c for c in comparisons if (c["setting"], c["metric"], c["a"]) == (name, metric, arm)),
                    None,
                )
                if row:
                    y = -(i + 0.2 * (j - 1))
                    axis.errorbar(
                        row["difference"],
                        y,
                        xerr=[[row["difference"] - row["lo"]], [row["hi"] - row["difference"]]],
                        fmt="o",
                        color=f"C{j}",
                        label=arm.removeprefix("frpo-lam") if i == 0 else None,
                        capsize=2,
                    )
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_title(metric)
        axis.set_xlabel("FRPO - GRPO")
    axes[0].set_yticks([-i for i in range(len(done))], [SETTINGS[name][0] for name in done])
    axes[0].set_ylim(0.5 - len(done), 0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), title="λ", loc="outside right center")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    kept = given.out / "testbed_map.json"
    result: dict[str, Any] = (
        json.loads(kept.read_text())
        if kept.is_file()
        else {"study": "testbed_map", "seeds": [], "comparisons": [], "arms": []}
    )
    for name, (label, kls, penalty, sets) in SETTINGS.items():
        if any(a["setting"] == name for a in result["arms"]):
            continue
        found = sweep(given.folder / name, given.seeds, kls, penalty, sets)
        result["seeds"] = found["seeds"]
        result["arms"] += [
            {"setting": name, **{k: v for k, v in a.items() if k != "coverage"}} for a in found["arms"]
        ]
        result["comparisons"] += [{"setting": name, "label": label, **c} for c in comparisons(found, kls)]
        kept.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["comparisons"], given.out / "testbed_map.png")


if __name__ == "__main__":
    main()
