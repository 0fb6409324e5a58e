"""What a judge costs a step: a recipe with its own rewards, and with a judge besides, in turns.

    python benchmarks/judges.py recipes/testbed.yaml --set base.num_steps=100 --out docs/results

The judge is an untrained model of a token per byte: its questions are long and its answers nonsense, but no
less work; --judge takes another. The learning rate moves no weight, so that all runs draw the same
completions, step for step; the first two steps of each are left out. Writes judges_WEIGH.json: median seconds
of a step and of the wait for scores, the ratio of the steps, and what the judge adds to one, per completion.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from frpo.recipe import load_recipe

ROOT = Path(__file__).parents[1]
ARM = "[{name: arm, objective: {estimator: {kind: grpo}, beta: 0.1, penalty: k3}}]"
LEFT_OUT = 2
NO_STEP = 1e-30
"""Below the spacing of float32 around any weight."""
TEMPLATE = """text: "Is {{ prompt }} well answered by {{ completion }}? "
choices: {right: 1.0, half: 0.5, wrong: 0.0}
weigh: WEIGH
"""
KINDS = ("rules", "judged")


def make_judge(folder: Path, path: str | None, weigh: str) -> dict[str, Any]:
    """A reward of kind judge, its template and, where none is given, its model."""
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / f"{weigh}.yaml"
    template.write_text(TEMPLATE.replace("WEIGH", weigh))
    if path is None:
        sys.path.append(str(ROOT))
        from tests.support.models import write_speller

        path = str(folder / "model")
        write_speller(Path(path))
    return {"kind": "judge", "name": "judge", "path": path, "template": str(template), "num_cpus": 0.5}


def measure_run(recipe: str, sets: list[str], folder: Path) -> list[Any]:
    """The rows of its steps, the first two left out."""
    from frpo.metrics import read_steps

    words = itertools.chain.from_iterable(("--set", text) for text in sets)
    command = [sys.executable, "-m", "frpo", "run", recipe, "--run-dir", str(folder), *words]
    subprocess.run(command, check=True)
    return read_steps(folder, "rlhf/arm")[LEFT_OUT:]


def summarise(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Of the steps of both kinds of run, which drew the same completions."""
    step = {kind: median(row.phases.step_s for row in rows[kind]) for kind in KINDS}
    score = {kind: median(row.phases.score_s for row in rows[kind]) for kind in KINDS}
    completions = rows["judged"][0].batch.num_completions
    return {
        "steps": len(rows["judged"]),
        "completions_per_step": completions,
        "seconds_per_step": step,
        "seconds_waiting_for_scores": score,
        "ratio": step["judged"] / step["rules"],
        "judge_seconds_per_completion": (step["judged"] - step["rules"]) / completions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe")
    parser.add_argument("--judge", help="folder or hub name of a model; default: one is made")
    parser.add_argument("--weigh", choices=("probability", "answer"), default="probability")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2, help="of both, neither always first")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-judges"))
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    judge = make_judge(args.folder / "judge", args.judge, args.weigh)
    plain = [reward.model_dump(mode="json") for reward in load_recipe(Path(args.recipe)).rewards]
    rewards = {"rules": plain, "judged": [*plain, judge]}
    sets = [
        *args.sets,
        f"arms={ARM}",
        f"learner.num_steps={args.steps}",
        f"learner.learning_rate={NO_STEP}",
        "downstream=[]",
        "evaluate.completions_per_prompt=1",
    ]
    rows: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in KINDS if number % 2 == 0 else reversed(KINDS):
            given = [*sets, f"rewards={json.dumps(rewards[kind])}"]
            rows[kind] += measure_run(args.recipe, given, args.folder / f"{kind}-{number}")
    asked = {"recipe": args.recipe, "judge": args.judge or "a token per byte", "weigh": args.weigh}
    text = json.dumps({**asked, **summarise(rows)}, indent=1)
    print(text)
    (args.out / f"judges_{args.weigh}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
