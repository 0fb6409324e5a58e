"""The certificate against the truth: the plug-in's bias, and how often the lower bound holds, over
completions per prompt.

    python benchmarks/certificate.py docs/results

Small policies whose worst case inside a KL ball is known exactly (rewards 0, 0.5 and 1), rare failures among
them. Writes certificate.json and certificate.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
RADII, COUNTS, DRAWS = (0.1, 0.5, 1.5), (16, 64, 256), 1000


def truth(probabilities: np.ndarray, radius: float) -> float:  # type: ignore[type-arg]
    """Least mean reward within the radius, by maximising the dual of the known policy."""

    def negative(log_lam: float) -> float:
        lam = float(np.exp(log_lam))
        return lam * float(np.log(probabilities @ np.exp(-VALUES / lam)).mean()) + lam * radius

    found = [
        minimize_scalar(negative, bounds=b, method="bounded", options={"xatol": 1e-10})
        for b in ((-5, 0), (0, 5), (5, 12))
    ]
    return max(0.0, -min(float(f.fun) for f in found))


def main() -> None:
    out = Path(sys.argv[1])
    rng, rows = np.random.default_rng(0), []
    cases = [(name, radius, count) for name in POLICIES for radius in RADII for count in COUNTS]
    for name, radius, count in track(cases, "drawing"):
        p, exact = POLICIES[name], truth(POLICIES[name], radius)
        plug_in, bound = [], []
        for _ in range(DRAWS):
            u = rng.random((len(p), count, 1))
            drawn = VALUES[(u > np.cumsum(p, axis=1)[:, None, :-1]).sum(axis=2)]
            plug_in.append(worst_case_reward(drawn, radius))
            bound.append(reward_lower_bound(drawn, radius, floor=0.0))
        rows.append(
            {
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
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "certificate.json").write_text(
        json.dumps({"study": "certificate", "seeds": [0], "comparisons": [], "rows": rows}, indent=1)
    )
    figure, grid = plt.subplots(1, len(POLICIES), figsize=(4.2 * len(POLICIES), 3.6), sharey=True)
    for axes, name in zip(grid, POLICIES, strict=True):
        for radius, colour in zip(RADII, ("#2563c9", "#d2620a", "#18875a"), strict=True):
            mine = [r for r in rows if (r["policy"], r["radius"]) == (name, radius)]
            axes.axhline(mine[0]["truth"], color=colour, linewidth=0.8, label=f"truth at {radius:g} nats")
            axes.plot(
                COUNTS, [r["plug_in"] for r in mine], "--o", color=colour, markersize=4, label="plug-in, mean"
            )
            axes.plot(
                COUNTS,
                [r["bound"] for r in mine],
                "-s",
                color=colour,
                markersize=4,
                label="lower bound, mean",
            )
        axes.set(title=name, xscale="log", xlabel="completions per prompt")
        axes.set_xticks(COUNTS, [str(c) for c in COUNTS])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("least mean reward within the radius")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(out / "certificate.png", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
