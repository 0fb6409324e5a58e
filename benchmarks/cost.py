"""What FRPO costs beside GRPO: seconds per step of both, in turns, in one run on the same engines.

    python benchmarks/cost.py recipes/testbed.yaml --blocks 30 --steps 22

Every block starts again from the base policy, with the same settings but the method, and a learning rate that
moves no weight: both methods draw, score and train on the same completions, step for step, where policies of
their own would draw longer or shorter ones. The first two steps of a block, and the first pair of blocks, are
left out. Prints one JSON line: seconds per step of both (mean of the blocks' medians), their ratio with its
95 % interval (bootstrap over pairs of neighbouring blocks), and the driver's CPU time as a share of the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

METHODS = {"grpo": {"kind": "grpo"}, "frpo": {"kind": "frpo", "lam": 0.5}}
LEFT_OUT = 2
NO_STEP = 1e-30
"""Below the spacing of float32 around any weight."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-cost"))
    args = parser.parse_args()
    arms = [
        {"name": f"{name}-{block}", "objective": {"estimator": estimator, "penalty": "k3", "beta": 0.1}}
        for block in range(args.blocks + 1)
        for name, estimator in list(METHODS.items())[:: 1 if block % 2 else -1]  # neither is always the first
    ]
    sets = [
        *args.sets,
        f"arms={json.dumps(arms)}",
        f"learner.num_steps={args.steps}",
        f"learner.learning_rate={NO_STEP}",
        "downstream=[]",
        "evaluate.validate_every=1000000",
        "evaluate.completions_per_prompt=1",
        "checkpoint.every=1000000",
    ]
    words = [w for s in sets for w in ("--set", s)]
    subprocess.run(
        [sys.executable, "-m", "frpo", "run", args.recipe, "--run-dir", str(args.folder), *words], check=True
    )

    from frpo.metrics import read_steps

    def blocks(name: str, field: str) -> np.ndarray:  # type: ignore[type-arg]
        found = [read_steps(args.folder, f"rlhf/{name}-{b}")[LEFT_OUT:] for b in range(1, args.blocks + 1)]
        return np.array(
            [np.median([getattr(r.phases, field) for r in rows]) for rows in found]
        )  # a hiccup of the machine is nobody's cost

    seconds = {name: blocks(name, "step_s") for name in METHODS}
    rows = np.random.default_rng(0).integers(args.blocks, size=(10_000, args.blocks))
    ratios = seconds["frpo"][rows].mean(axis=1) / seconds["grpo"][rows].mean(axis=1)
    lo, hi = np.quantile(ratios, [0.025, 0.975])
    print(
        json.dumps(
            {
                "recipe": args.recipe,
                "blocks": args.blocks,
                "steps": args.steps - LEFT_OUT,
                "seconds_per_step": {name: float(s.mean()) for name, s in seconds.items()},
                "ratio": float(seconds["frpo"].mean() / seconds["grpo"].mean()),
                "lo": float(lo),
                "hi": float(hi),
                "driver_share": {
                    name: float(blocks(name, "driver_s").mean() / s.mean()) for name, s in seconds.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
