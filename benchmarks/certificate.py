"""The certificate against the truth: the plug-in's bias, and how often the lower bound holds, over
completions per prompt.

    python benchmarks/certificate.py docs/results

Small policies whose worst case inside a KL ball is known exactly: rewards of 0, 0.5 and 1, rare failures
among them, and continuous ones; many prompts and one, few completions and many. Writes certificate.json and
certificate.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.progress import track
from scipy.optimize import minimize_scalar
from scipy.special import hyp1f1

from frpo.certificate import reward_lower_bounds, worst_case_reward

Doubles = NDArray[np.float64]

VALUES = np.array([0.0, 0.5, 1.0])
RADII = (0.1, 0.5, 1.5)
COUNTS = (16, 64, 256)
"""Completions per prompt."""
DRAWS = 1000
PLUG_INS = 200
"""Of the draws so many for the plug-in, which costs most."""


@dataclass(frozen=True)
class Graded:
    """Rewards VALUES, with probabilities of their own for each prompt."""

    probabilities: Doubles
    """[X, 3]"""
    counts: tuple[int, ...] = COUNTS

    def draw(self, rng: np.random.Generator, count: int) -> Doubles:
        u = rng.random((len(self.probabilities), count, 1))
        drawn: Doubles = VALUES[(u > np.cumsum(self.probabilities, axis=1)[:, None, :-1]).sum(axis=2)]
        return drawn

    def log_mean_z(self, lam: float) -> Doubles:
        """log E exp(-r / lam) of each prompt `[X]`."""
        log_mean: Doubles = np.log(self.probabilities @ np.exp(-VALUES / lam))
        return log_mean


@dataclass(frozen=True)
class Continuous:
    """Beta distributed rewards, `[X]` parameters of either kind."""

    a: Doubles
    b: Doubles
    counts: tuple[int, ...] = COUNTS

    def draw(self, rng: np.random.Generator, count: int) -> Doubles:
        return rng.beta(self.a[:, None], self.b[:, None], (len(self.a), count))

    def log_mean_z(self, lam: float) -> Doubles:
        log_mean: Doubles = np.log(hyp1f1(self.a, self.a + self.b, -1 / lam))
        return log_mean


def _tile_rows(prompts: int, probabilities: ArrayLike) -> Doubles:
    return np.tile(probabilities, (prompts, 1))


POLICIES: dict[str, Graded | Continuous] = {
    "mixed: 12 prompts, 30 % fail": Graded(_tile_rows(12, [0.3, 0.1, 0.6])),
    "spread: 12 prompts, 0.1 % to 60 % fail": Graded(
        np.stack([[p, 0.1 * (1 - p), 0.9 * (1 - p)] for p in np.linspace(0.001, 0.6, 12)])
    ),
    "rare: 50 prompts, 1 in 1,000 fails": Graded(_tile_rows(50, [0.001, 0.0, 0.999])),
    "heavy: of 200 prompts 10 always fail, 190 at 2 %": Graded(
        np.vstack([_tile_rows(10, [1.0, 0.0, 0.0]), _tile_rows(190, [0.02, 0.05, 0.93])])
    ),
    "continuous: 30 prompts, means of 0.3 to 0.95": Continuous(
        4 * np.linspace(0.3, 0.95, 30), 4 * (1 - np.linspace(0.3, 0.95, 30))
    ),
    "one: a prompt, 10 % fail": Graded(_tile_rows(1, [0.1, 0.1, 0.8])),
    "few: 200 prompts, 20 % fail": Graded(_tile_rows(200, [0.2, 0.1, 0.7]), (2, 4, 8)),
}


def true_worst_case(policy: Graded | Continuous, radius: float) -> float:
    """Least mean reward within the radius, by maximising the dual of the known policy."""

    def negative(log_lam: float) -> float:
        lam = float(np.exp(log_lam))
        return lam * (float(policy.log_mean_z(lam).mean()) + radius)

    options = {"xatol": 1e-10}
    least = []
    for bounds in ((-5, 0), (0, 5), (5, 12)):
        least.append(float(minimize_scalar(negative, bounds=bounds, method="bounded", options=options).fun))
    return max(0.0, -min(least))


def measure_case(name: str, count: int) -> Iterator[dict[str, Any]]:
    """For each radius the means of both estimates over DRAWS samples, and the share of samples in which each
    was not too high (the plug-in: over PLUG_INS of them)."""
    policy = POLICIES[name]
    rng = np.random.default_rng([list(POLICIES).index(name), count])
    plug_ins = np.empty((PLUG_INS, len(RADII)))
    bounds = np.empty((DRAWS, len(RADII)))
    for i in range(DRAWS):
        rewards = policy.draw(rng, count)
        bounds[i] = reward_lower_bounds(rewards, RADII, floor=0.0)
        if i < PLUG_INS:
            plug_ins[i] = [worst_case_reward(rewards, radius) for radius in RADII]
    for radius, plug_in, bound in zip(RADII, plug_ins.T, bounds.T, strict=True):
        exact = true_worst_case(policy, radius)
        yield {
            "policy": name,
            "radius": radius,
            "completions": count,
            "draws": DRAWS,
            "plug_in_draws": PLUG_INS,
            "truth": exact,
            "plug_in": float(plug_in.mean()),
            "bound": float(bound.mean()),
            "plug_in_held": float(np.mean(plug_in <= exact + 1e-9)),
            "bound_held": float(np.mean(bound <= exact + 1e-9)),
            "confidence": 0.95,
        }


def main() -> None:
    out = Path(sys.argv[1])
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, int]] = []
    for name, policy in POLICIES.items():
        cases += [(name, count) for count in policy.counts]
    for name, count in track(cases, "drawing"):
        rows += measure_case(name, count)
    study = {"study": "certificate", "seeds": [0], "comparisons": [], "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "certificate.json").write_text(json.dumps(study, indent=1))
    draw_cases(rows, out / "certificate.png")


def draw_cases(rows: list[dict[str, Any]], file: Path) -> None:
    """A policy a panel, a radius a colour."""
    figure, grid = plt.subplots(2, 4, figsize=(16.8, 7.2), sharey=True)
    for axes, (name, policy) in zip(grid.flat, POLICIES.items(), strict=False):
        for radius, colour in zip(RADII, ("#2563c9", "#d2620a", "#18875a"), strict=True):
            mine = [row for row in rows if (row["policy"], row["radius"]) == (name, radius)]
            plug_in = [row["plug_in"] for row in mine]
            bound = [row["bound"] for row in mine]
            axes.axhline(mine[0]["truth"], color=colour, linewidth=0.8, label=f"truth at {radius:g} nats")
            axes.plot(policy.counts, plug_in, "--o", color=colour, markersize=4, label="plug-in, mean")
            axes.plot(policy.counts, bound, "-s", color=colour, markersize=4, label="lower bound, mean")
        axes.set(title=name, xscale="log", xlabel="completions per prompt")
        axes.title.set_size(10)
        axes.set_xticks(policy.counts, [str(count) for count in policy.counts])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("least mean reward within the radius")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    for axes in grid.flat[len(POLICIES) :]:
        axes.axis("off")
        axes.legend(handles, labels, loc="center", frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
