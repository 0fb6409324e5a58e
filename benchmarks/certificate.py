"""The certificate against the truth: the plug-in's bias, and how often the lower bound holds, over
completions per prompt.

    python benchmarks/certificate.py docs/results

Small policies whose worst case inside a KL ball is known exactly (rewards 0, 0.5 and 1), rare failures among
them. Writes certificate.json and certificate.png.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.progress import track
from scipy.optimize import minimize_scalar

from frpo.certificate import reward_lower_bound, worst_case_reward

VALUES = np.array([0.0, 0.5, 1.0])
POLICIES = {
    "mixed: 12 prompts, 30 % fail": np.tile([0.3, 0.1, 0.6], (12, 1)),
    "spread: 12 prompts, 0.1 % to 60 % fail": np.stack(
        [[p, 0.1 * (1 - p), 0.9 * (1 - p)] for p in np.linspace(0.001, 0.6, 12)]
    ),
    "rare: 50 prompts, 1 in 1,000 fails": np.tile([0.001, 0.0, 0.999], (50, 1)),
}
RADII = (0.1, 0.5, 1.5)
COUNTS = (16, 64, 256)
"""Completions per prompt."""
DRAWS = 1000


def true_worst_case(probabilities: np.ndarray, radius: float) -> float:  # type: ignore[type-arg]
    """Least mean reward within the radius, by maximising the dual of the known policy."""

    def negative(log_lam: float) -> float:
        lam = float(np.exp(log_lam))
        return lam * float(np.log(probabilities @ np.exp(-VALUES / lam)).mean()) + lam * radius

    options = {"xatol": 1e-10}
    least = []
    for bounds in ((-5, 0), (0, 5), (5, 12)):
        least.append(float(minimize_scalar(negative, bounds=bounds, method="bounded", options=options).fun))
    return max(0.0, -min(least))


def measure_case(rng: np.random.Generator, name: str, radius: float, count: int) -> dict[str, Any]:
    """Means of both estimates over DRAWS samples, and the share of samples in which each was not too high."""
    p = POLICIES[name]
    exact = true_worst_case(p, radius)
    plug_in = []
    bound = []
    for _ in range(DRAWS):
        u = rng.random((len(p), count, 1))
        drawn = VALUES[(u > np.cumsum(p, axis=1)[:, None, :-1]).sum(axis=2)]
        plug_in.append(worst_case_reward(drawn, radius))
        bound.append(reward_lower_bound(drawn, radius, floor=0.0))
    return {
        "policy": name,
        "radius": radius,
        "completions": count,
        "draws": DRAWS,
        "truth": exact,
        "plug_in": float(np.mean(plug_in)),
        "bound": float(np.mean(bound)),
        "plug_in_held": float(np.mean(np.array(plug_in) <= exact + 1e-9)),
        "bound_held": float(np.mean(np.array(bound) <= exact + 1e-9)),
        "confidence": 0.95,
    }


def main() -> None:
    out = Path(sys.argv[1])
    rng = np.random.default_rng(0)
    cases = list(itertools.product(POLICIES, RADII, COUNTS))
    rows = [measure_case(rng, *case) for case in track(cases, "drawing")]
    study = {"study": "certificate", "seeds": [0], "comparisons": [], "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "certificate.json").write_text(json.dumps(study, indent=1))
    draw_cases(rows, out / "certificate.png")


def draw_cases(rows: list[dict[str, Any]], file: Path) -> None:
    """A policy a panel, a radius a colour."""
    figure, grid = plt.subplots(1, len(POLICIES), figsize=(4.2 * len(POLICIES), 3.6), sharey=True)
    for axes, name in zip(grid, POLICIES, strict=True):
        for radius, colour in zip(RADII, ("#2563c9", "#d2620a", "#18875a"), strict=True):
            mine = [row for row in rows if (row["policy"], row["radius"]) == (name, radius)]
            plug_in = [row["plug_in"] for row in mine]
            bound = [row["bound"] for row in mine]
            axes.axhline(mine[0]["truth"], color=colour, linewidth=0.8, label=f"truth at {radius:g} nats")
            axes.plot(COUNTS, plug_in, "--o", color=colour, markersize=4, label="plug-in, mean")
            axes.plot(COUNTS, bound, "-s", color=colour, markersize=4, label="lower bound, mean")
        axes.set(title=name, xscale="log", xlabel="completions per prompt")
        axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("least mean reward within the radius")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
