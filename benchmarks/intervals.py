"""How often intervals hold: those of `frpo.report.intervals`, and the bootstrap that they replaced.

    OMP_NUM_THREADS=1 python benchmarks/intervals.py --out docs/results

Draws studies of 2 to 12 seeds whose truth is known: the lead of one method over another, the mean over all
seeds and all prompts that could have been drawn. Counts how often an interval of 95 % holds it, and one
corrected for 40 comparisons (99.875 %). Methods: `bootstrap`, percentiles of 4,000 draws of seeds and
prompts; `t over seeds`, which is told nothing of prompts; `frpo`; and `remade`, from the bounds of a
bootstrap, as the tables of old studies are made whose runs are gone (benchmarks/remake.py). Settings: seeds,
prompts and completions with normal noise; rewards near 1, skewed; and two methods at an equal KL, whose arms
lie far apart in KL as under k3, or close together as in testbed_reverse. Writes intervals.json and
intervals.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from remake import remake_interval

from frpo.report.comparisons import read_curves
from frpo.report.intervals import Doubles, Interval, interval_of
from frpo.report.student import CONFIDENCE

SEEDS = (2, 3, 5, 8, 10, 12)
CONFIDENCES = (CONFIDENCE, 1 - (1 - CONFIDENCE) / 40)
DRAWS = 4_000
TRIALS = 10_000
BOOTSTRAPPED = 1_000
"""Of them, by the two methods that draw."""
METHODS = ("bootstrap", "t over seeds", "frpo", "remade")
LEAD = 0.05


@dataclass(frozen=True)
class Study:
    """Two methods, one or more arms each; with several they are compared at one KL."""

    kept: Doubles
    """[2, arms, seeds, prompts]"""
    kl: Doubles | None = None
    """[2, arms, seeds]"""
    at_kl: float = 0.0


@dataclass(frozen=True)
class Setting:
    words: str
    draw: Callable[[np.random.Generator, int], Study]
    truth: float = LEAD


def draw_normal(rng: np.random.Generator, seeds: int, *, of_prompts: float, prompts: int) -> Study:
    """The lead differs by 0.1 between seeds, by `of_prompts` between prompts, single numbers by 0.3."""
    lead = LEAD + rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, of_prompts, prompts)
    lead = lead + rng.normal(0, 0.3, (seeds, prompts))
    return Study(np.stack([np.zeros_like(lead), lead])[:, None])


KEPT = ((4.0, 0.8), (8.0, 0.4))
"""Beta distributions of what a seed of each method keeps: 0.83 and 0.95 in the mean."""
EASE = (9.0, 1.0)
"""Of the share of it that is left on a prompt: 0.9 in the mean."""


def mean_of_beta(alpha: float, beta: float) -> float:
    return alpha / (alpha + beta)


def draw_skewed(rng: np.random.Generator, seeds: int) -> Study:
    """Shares of four completions that are right, on 72 prompts."""
    ease = rng.beta(*EASE, 72)
    levels = np.stack([rng.beta(*shape, (seeds, 1)) for shape in KEPT])
    return Study((rng.binomial(4, levels * ease) / 4)[:, None])


def draw_curves(rng: np.random.Generator, seeds: int, *, kls: Doubles, at_kl: float) -> Study:
    """kls [2, arms], means. Seeds differ in KL by 0.05 and in what they keep by 0.1, their arms by 0.03 and
    0.08 more; 0.6 more is kept a nat."""
    kl = kls[..., None] + rng.normal(0, 0.05, seeds)
    kl += rng.normal(0, 0.03, kl.shape)
    kept = 0.3 + 0.6 * kl + rng.normal(0, 0.1, seeds) + rng.normal(0, 0.08, kl.shape)
    kept[1] += LEAD
    return Study(kept[..., None], kl, at_kl)


WIDE = np.array([[0.40, 0.48, 0.53, 0.92], [0.44, 0.53, 0.76, 0.93]])
CLOSE = np.array([[0.47, 0.50, 0.52, 0.56], [0.43, 0.49, 0.52, 0.57]])
SETTINGS = (
    Setting("72 alike prompts", partial(draw_normal, of_prompts=0.0, prompts=72)),
    Setting("12 prompts that differ", partial(draw_normal, of_prompts=0.2, prompts=12)),
    Setting(
        "skewed, near 1",
        draw_skewed,
        (mean_of_beta(*KEPT[1]) - mean_of_beta(*KEPT[0])) * mean_of_beta(*EASE),
    ),
    Setting("at equal KL, arms far apart", partial(draw_curves, kls=WIDE, at_kl=0.68)),
    Setting("at equal KL, arms close together", partial(draw_curves, kls=CLOSE, at_kl=0.515)),
)


def leads_of(study: Study) -> Doubles:
    """[seeds, prompts] of the seeds that are compared."""
    if study.kl is None:
        return np.asarray(study.kept[1, 0] - study.kept[0, 0])
    first, other = (read_curves(study.kl[i], study.kept[i], study.at_kl) for i in (0, 1))
    return (other - first)[np.isfinite(other - first).all(axis=1)]


def draw_leads(study: Study) -> Doubles:
    """[1 + DRAWS], by the old bootstrap: seeds and prompts with replacement, the curve through the means; the
    first is the sample itself."""
    seeds = draw_shares(study.kept.shape[2])
    if study.kl is None:
        leads = leads_of(study)
        return np.asarray(((seeds @ leads) * draw_shares(leads.shape[1])).sum(axis=1))
    kl = np.einsum("ds,mas->mad", seeds, study.kl)
    kept = np.einsum("ds,mas->mad", seeds, study.kept[..., 0])
    return interpolate_columns(kl[1], kept[1], study.at_kl) - interpolate_columns(kl[0], kept[0], study.at_kl)


@cache
def draw_shares(count: int) -> Doubles:
    """[1 + DRAWS, count]: how much of each draw an item makes up, the same for every study; the first is the
    sample itself."""
    drawn = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def interpolate_columns(kl: Doubles, kept: Doubles, at_kl: float) -> Doubles:
    """np.interp for every column of [arms, draws]."""
    order = kl.argsort(axis=0)
    x = np.take_along_axis(kl, order, 0)
    y = np.take_along_axis(kept, order, 0)
    after = (x < at_kl).sum(axis=0, keepdims=True).clip(1, len(x) - 1)
    x0, x1 = (np.take_along_axis(x, at, 0)[0] for at in (after - 1, after))
    y0, y1 = (np.take_along_axis(y, at, 0)[0] for at in (after - 1, after))
    return np.asarray(y0 + (y1 - y0) * ((at_kl - x0) / (x1 - x0)).clip(0, 1))


def make_intervals(study: Study, confidence: float, draws: Doubles | None) -> dict[str, Interval]:
    """By method: of the leads of the seeds, and of the bootstrap's draws where there are any."""
    leads = leads_of(study)
    intervals = {}
    if leads.size:
        intervals["frpo"] = interval_of(leads, confidence)
        intervals["t over seeds"] = interval_of(leads.mean(axis=1, keepdims=True), confidence)
    if draws is not None:
        seeds = study.kept.shape[2]
        intervals["bootstrap"] = cut_tails(draws, confidence)
        intervals["remade"] = remake_interval(cut_tails(draws, CONFIDENCE), seeds, confidence)
    return intervals


def cut_tails(draws: Doubles, confidence: float) -> Interval:
    """Between quantiles of the draws, around the sample itself."""
    lo, hi = np.quantile(draws[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(draws[0]), lo=float(lo), hi=float(hi))


def count_held(setting: Setting, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each method and confidence."""
    rng = np.random.default_rng(seeds)
    bounds: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for trial in range(TRIALS):
        study = setting.draw(rng, seeds)
        draws = draw_leads(study) if trial < BOOTSTRAPPED else None
        for confidence in CONFIDENCES:
            for method, one in make_intervals(study, confidence, draws).items():
                if one.lo is not None and one.hi is not None:
                    bounds[method, confidence].append((one.lo, one.hi))
    for method, confidence in itertools.product(METHODS, CONFIDENCES):
        given = bounds[method, confidence]
        trials = BOOTSTRAPPED if method in ("bootstrap", "remade") else TRIALS
        row = {"setting": setting.words, "method": method, "seeds": seeds, "confidence": confidence}
        row |= {"trials": trials, "given": len(given) / trials}
        if len(given) >= trials / 10:
            row["held"] = float(np.mean([lo <= setting.truth <= hi for lo, hi in given]))
            row["half"] = float(np.median([(hi - lo) / 2 for lo, hi in given]))
        yield row


def draw_picture(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """A setting a column, a confidence a row, a method a line: how often the interval misses, over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(SETTINGS), 5.2), layout="constrained")
    grid = figure.subplots(len(CONFIDENCES), len(SETTINGS), sharex=True, sharey="row")
    for (i, confidence), (k, setting) in itertools.product(enumerate(CONFIDENCES), enumerate(SETTINGS)):
        axis = grid[i][k]
        axis.axhline(1 - confidence, color="grey", lw=0.8, ls="--")
        for method in METHODS:
            place = (setting.words, method, confidence)
            points = [row for row in rows if (row["setting"], row["method"], row["confidence"]) == place]
            points = [row for row in points if "held" in row]
            missed = [max(1 - row["held"], 0.5 / row["trials"]) for row in points]
            axis.plot([row["seeds"] for row in points], missed, "o-", ms=4, lw=1.2, label=method)
        axis.set_yscale("log")
        axis.set_title(setting.words, fontsize=9)
    for axis, confidence in zip(grid[:, 0], CONFIDENCES, strict=True):
        axis.set_ylabel(f"misses, {1 - confidence:.3g} promised")
    for axis in grid[-1]:
        axis.set_xlabel("seeds")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for setting, seeds in itertools.product(SETTINGS, SEEDS):
        rows += count_held(setting, seeds)
    result = {"study": "intervals", "draws": DRAWS, "rows": rows}
    (given.out / "intervals.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_picture(rows, given.out / "intervals.png")


if __name__ == "__main__":
    main()
