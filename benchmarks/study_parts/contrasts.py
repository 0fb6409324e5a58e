"""Two families of arms compared at equal KL, seed by seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from frpo.report.intervals import Doubles, Interval, interval_of

from .seeds import KL, Seed, curve_of, stack

LEAST_SEEDS = 10
"""That reach a KL, for a comparison to be made there."""


@dataclass(frozen=True)
class Side:
    family: str
    metric: str
    label: str = ""
    """What it is called; empty: as its family."""

    @property
    def name(self) -> str:
        return self.label or self.family


@dataclass(frozen=True)
class Contrast:
    """a - b, of what `metric` names."""

    metric: str
    a: Side
    b: Side


@dataclass(frozen=True)
class Row:
    """a - b at one KL, or of the means over the arms of each family; positive: a has more."""

    question: str
    metric: str
    a: str
    b: str
    at_kl: float | None
    """None where every arm counts at a KL of its own."""
    num_seeds: int
    difference: float
    lo: float | None
    hi: float | None
    corrected_lo: float | None
    """At the confidence that holds for all that a question compares by one metric (Bonferroni)."""
    corrected_hi: float | None


def compare(
    seeds: Sequence[Seed],
    question: str,
    contrasts: Sequence[Contrast],
    kls: Sequence[float],
    made: int | None = None,
) -> Iterator[Row]:
    """At every KL, corrected for `made` comparisons; None: for those that enough seeds reach."""
    gaps: list[tuple[Contrast, float, Doubles]] = []
    for contrast, at_kl in itertools.product(contrasts, kls):
        sides = (contrast.a, contrast.b)
        both = [seed for seed in seeds if all(seed.family(side.family, side.metric) for side in sides)]
        if both:
            a, b = (curve_of(both, side.family, side.metric, at_kl) for side in sides)
            gaps.append((contrast, at_kl, finite_seeds(a - b)))
    made = made or sum(len(gap) >= LEAST_SEEDS for *_, gap in gaps)
    for contrast, at_kl, gap in gaps:
        yield _make_row(question, contrast, at_kl, gap, made)


def compare_means(seeds: Sequence[Seed], question: str, contrasts: Sequence[Contrast]) -> Iterator[Row]:
    """Of a family's arms, each at its own KL; corrected for all of the contrasts."""
    for contrast in contrasts:
        a, b = (mean_of(seeds, side) for side in (contrast.a, contrast.b))
        yield _make_row(question, contrast, None, finite_seeds(a - b), len(contrasts))


def mean_of(seeds: Sequence[Seed], side: Side) -> Doubles:
    """Over a family's arms: [seeds, prompts]"""
    return stack(seeds, seeds[0].family(side.family), side.metric).mean(axis=0)


def middle_kl(seeds: Sequence[Seed], a: str, b: str) -> float:
    """Median over seeds of the middle of the KLs that two families both reach, or of what lies between them,
    nats."""
    middles = []
    for seed in seeds:
        of_both = [[seed.arms[arm][KL][0] for arm in seed.family(family)] for family in (a, b)]
        middles.append((max(map(min, of_both)) + min(map(max, of_both))) / 2)
    return float(np.median(middles))


def finite_seeds(values: Doubles) -> Doubles:
    """Of [seeds, prompts] the seeds that have a number for every prompt."""
    return values[np.isfinite(values).all(axis=1)]


def _make_row(question: str, contrast: Contrast, at_kl: float | None, gap: Doubles, made: int) -> Row:
    """`gap` [seeds, prompts]; no interval where too few seeds reach the KL."""
    where = (question, contrast.metric, contrast.a.name, contrast.b.name, at_kl, len(gap))
    if len(gap) < LEAST_SEEDS:
        mean = float(gap.mean()) if len(gap) else float("nan")
        return Row(*where, mean, None, None, None, None)
    plain = interval_of(gap)
    corrected = interval_of(gap, 1 - 0.05 / made)
    return Row(*where, plain.mean, plain.lo, plain.hi, corrected.lo, corrected.hi)


def level_of(seeds: Sequence[Seed], side: Side, at_kl: float) -> Interval | None:
    """Mean over the seeds that reach the KL; None where they are fewer than LEAST_SEEDS."""
    curve = finite_seeds(curve_of(seeds, side.family, side.metric, at_kl))
    return interval_of(curve) if len(curve) >= LEAST_SEEDS else None
