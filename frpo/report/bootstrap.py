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
"""Of one arm of one seed, given the seed's report and the arm's index: a number, or one for each prompt."""


class Table:
    """Numbers of every arm, seed and prompt, and one set of bootstrap draws for all of them.

    A draw takes seeds with replacement, and prompts with replacement; every seed is measured on the same
    prompts, so the prompts of a draw are the same for all of its seeds. Its first row is the sample itself.

    Example: of two seeds a row of `seeds` is [1/2, 1/2] (the sample), [1, 0] or [0, 1].
    """

    def __init__(self, reports: Sequence[Report], focus: str) -> None:
        self.reports = reports
        self.focus = focus
        self.arms = [arm.name for arm in reports[0].arms]
        self.finetunes = _finetunes_of_all(reports, focus)
        self.seeds = _draw_shares(np.random.default_rng(0), len(reports))
        self.prompts: dict[int, Doubles] = {}
        """By the number of prompts: the same draws for all values of that many."""

    def of(self, value: Value) -> Doubles:
        """[arms, seeds, prompts]; one prompt for what is no mean over prompts."""
        arms = []
        for i in range(len(self.arms)):
            arms.append([np.atleast_1d(value(report, i)) for report in self.reports])
        return np.array(arms, dtype=np.float64)

    def draws(self, values: Doubles) -> Doubles:
        """values [..., seeds, prompts] -> means [..., 1 + DRAWS]"""
        size = values.shape[-1]
        if size not in self.prompts:
            self.prompts[size] = _draw_shares(np.random.default_rng(size), size)
        return np.einsum("ds,...sp,dp->...d", self.seeds, values, self.prompts[size], optimize=True)

    def interval(self, values: Doubles, confidence: float = CONFIDENCE) -> Interval:
        """values [seeds, prompts]"""
        return interval_of(self.draws(values), confidence)

    def measured(self, values: Doubles) -> Interval | None:
        """The same; None where a seed has no number."""
        return self.interval(values) if np.isfinite(values).all() else None


def _finetunes_of_all(reports: Sequence[Report], focus: str) -> list[str]:
    """Fine-tunes after which every arm of every seed was measured on the focus task, by name."""
    measured = []
    for report in reports:
        for arm in report.arms:
            measured.append({kept.downstream for kept in arm.kept if kept.task == focus})
    return sorted(set.intersection(*measured))


def _draw_shares(rng: np.random.Generator, count: int) -> Doubles:
    """[1 + DRAWS, count]: how much of each draw an item makes up; the first row is the sample itself."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def interval_of(draws: Doubles, confidence: float) -> Interval:
    """draws [1 + DRAWS] -> the first one, between quantiles of the others."""
    lo, hi = np.quantile(draws[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(draws[0]), lo=float(lo), hi=float(hi))
