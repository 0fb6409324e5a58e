"""What FRPO costs beside GRPO: seconds per step of both, in turns, in one run on the same engines.

    python benchmarks/cost.py recipes/testbed.yaml --blocks 30 --steps 22

Every block starts again from the base policy, with the same settings but the method, and a learning rate that
moves no weight: both methods draw, score and train on the same completions, step for step, where policies of
their own would draw longer or shorter ones. The first two steps of a block, and the first pair of blocks, are
left out. Prints one JSON line: seconds per step of both (mean of the blocks' medians), their ratio with its
95 % interval (Student's t over pairs of blocks), and the driver's CPU time as a share of the step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

METHODS: dict[str, dict[str, Any]] = {"grpo": {"kind": "grpo"}, "frpo": {"kind": "frpo", "lam": 0.5}}
LEFT_OUT = 2
NO_STEP = 1e-30
"""Below the spacing of float32 around any weight."""


def arms_of(blocks: int) -> list[dict[str, Any]]:
    """Both methods in every block; neither is always the first."""
    arms = []
    for block in range(blocks):
        names = list(METHODS) if block % 2 else list(reversed(METHODS))
        for name in names:
            arms.append(
                {
                    "name": f"{name}-{block}",
                    "objective": {"estimator": METHODS[name], "penalty": "k3", "beta": 0.1},
                }
            )
    return arms


def medians_of(folder: Path, name: str, blocks: int, field: str) -> np.ndarray:  # type: ignore[type-arg]
    """Of each block but the first; a hiccup of the machine is nobody's cost."""
    from frpo.metrics import read_steps

    medians = []
    for block in range(1, blocks + 1):
        rows = read_steps(folder, f"rlhf/{name}-{block}")[LEFT_OUT:]
        medians.append(np.median([getattr(row.phases, field) for row in rows]))
    return np.array(medians)


def divide_means(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:  # type: ignore[type-arg]
    """The ratio of two means and half of its interval, by what each block differs from it."""
    from frpo.report.student import CONFIDENCE, t_of

    ratio = above.mean() / below.mean()
    error = (above - ratio * below).std(ddof=1) / np.sqrt(len(above)) / below.mean()
    return float(ratio), float(t_of(len(above) - 1, CONFIDENCE) * error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-cost"))
    args = parser.parse_args()
    sets = [
        *args.sets,
        f"arms={json.dumps(arms_of(args.blocks + 1))}",
        f"learner.num_steps={args.steps}",
        f"learner.learning_rate={NO_STEP}",
        "downstream=[]",
        "evaluate.validate_every=1000000",
        "evaluate.completions_per_prompt=1",
        "checkpoint.every=1000000",
    ]
    words = itertools.chain.from_iterable(("--set", text) for text in sets)
    subprocess.run(
        [sys.executable, "-m", "frpo", "run", args.recipe, "--run-dir", str(args.folder), *words], check=True
    )
    seconds = {name: medians_of(args.folder, name, args.blocks, "step_s") for name in METHODS}
    driver = {name: medians_of(args.folder, name, args.blocks, "driver_s") for name in METHODS}
    ratio, half = divide_means(seconds["frpo"], seconds["grpo"])
    print(
        json.dumps(
            {
                "recipe": args.recipe,
                "blocks": args.blocks,
                "steps": args.steps - LEFT_OUT,
                "seconds_per_step": {name: float(seconds[name].mean()) for name in METHODS},
                "ratio": ratio,
                "lo": ratio - half,
                "hi": ratio + half,
                "driver_share": {name: float(driver[name].mean() / seconds[name].mean()) for name in METHODS},
            }
        )
    )


if __name__ == "__main__":
    main()
