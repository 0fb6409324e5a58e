"""Bootstrap over seeds and prompts: one set of draws for all numbers of several runs, so that differences are
paired by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from frpo.records import Record
from frpo.report.schema import Report

Doubles = NDArray[np.float64]
DRAWS = 4_000
CONFIDENCE = 0.95


class Interval(Record):
    """A mean over seeds and prompts and its bootstrap interval."""

    mean: float
    lo: float
    hi: float


Value = Callable[[Report, int], float | Sequence[float]]
"""Of one arm of one seed: a number, or one for each prompt."""


class Table:
    """Numbers of every arm, seed and prompt, and one set of bootstrap draws for all of them.

    A draw takes seeds with replacement, and prompts with replacement; every seed is measured on the same
    prompts, so the prompts of a draw are the same for all of its seeds. Its first row is the sample itself.
    """

    def __init__(self, reports: Sequence[Report], focus: str) -> None:
        self.reports, self.focus = reports, focus
        self.arms = [a.name for a in reports[0].arms]
        kept = [{k.downstream for k in a.kept if k.task == focus} for r in reports for a in r.arms]
        self.finetunes = sorted(set.intersection(*kept))
        self.seeds = _shares(np.random.default_rng(0), len(reports))
        self.prompts: dict[int, Doubles] = {}

    def of(self, value: Value) -> Doubles:
        """[arms, seeds, prompts]; one prompt for what is no mean over prompts."""
        return np.array(
            [[np.atleast_1d(value(r, i)) for r in self.reports] for i in range(len(self.arms))],
            dtype=np.float64,
        )

    def draws(self, values: Doubles) -> Doubles:
        """values [..., seeds, prompts] -> means [..., 1 + DRAWS]"""
        size = values.shape[-1]
        if size not in self.prompts:
            self.prompts[size] = _shares(np.random.default_rng(size), size)
        return np.einsum("ds,...sp,dp->...d", self.seeds, values, self.prompts[size], optimize=True)

    def interval(self, values: Doubles, confidence: float = CONFIDENCE) -> Interval:
        """values [seeds, prompts]"""
        return interval_of(self.draws(values), confidence)

    def measured(self, values: Doubles) -> Interval | None:
        """The same; None where a seed has no number."""
        return self.interval(values) if np.isfinite(values).all() else None


def _shares(rng: np.random.Generator, count: int) -> Doubles:
    """[1 + DRAWS, count]: how much of each draw an item makes up; the first row is the sample itself."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def interval_of(draws: Doubles, confidence: float) -> Interval:
    """Of the first draw, between quantiles of the others."""
    lo, hi = np.quantile(draws[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(draws[0]), lo=float(lo), hi=float(hi))
