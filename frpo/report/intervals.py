"""Numbers of every arm and seed, and intervals: what other seeds, and other prompts, would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from frpo.records import Record
from frpo.report.schema import Report
from frpo.report.student import CONFIDENCE, format_interval, t_of

Doubles = NDArray[np.float64]
MIN_SEEDS = 5
"""From fewer nothing is said of others. Corrected for 40 comparisons, three seeds would give a mean +- 16
standard deviations of a seed; five give +- 3.6, ten +- 1.5."""
METHOD = "Student's t over seeds, for kept reward over held-out prompts too"


class Interval(Record):
    """A mean over seeds and prompts, between limits for others."""

    mean: float
    lo: float | None
    hi: float | None
    """None from fewer than MIN_SEEDS."""

    def __format__(self, number: str) -> str:
        """Example: f"{interval:+.2f}" is "+0.10 [-0.05, +0.25]", and "+0.10" where there are no limits."""
        return format_interval(self.mean, self.lo, self.hi, number)


def interval_of(values: Doubles, confidence: float = CONFIDENCE) -> Interval:
    """values [seeds, prompts] -> mean +- t sqrt(variance), by Student's t with one degree of freedom less
    than there are seeds.

        variance = s^2 / seeds + p^2 / prompts

    s^2 is the variance between the seeds' means, noise of their prompts included; p^2 what prompts differ in
    beyond that noise, whatever the seed. All seeds are asked the same prompts, so that more seeds do not make
    the second term smaller. It is 0 for what is no mean over prompts, given as one prompt. Of a sum of two
    variances the fewer degrees of freedom are those of the widest t (Mickey and Brown, Bounds on the
    distribution functions of the Behrens-Fisher statistic, 1966): the interval holds too often, if anything.
    """
    seeds, prompts = values.shape
    mean = float(values.mean())
    if seeds < MIN_SEEDS:
        return Interval(mean=mean, lo=None, hi=None)
    variance = values.mean(axis=1).var(ddof=1) / seeds
    freedom = seeds - 1
    if prompts > 1:
        variance += _share_of_prompts(values)
        freedom = min(freedom, prompts - 1)
    half = t_of(freedom, confidence) * float(np.sqrt(variance))
    return Interval(mean=mean, lo=mean - half, hi=mean + half)


def _share_of_prompts(values: Doubles) -> float:
    """What the choice of prompts adds to the variance of the mean of [seeds, prompts]; the two-way analysis
    of variance, at least 0."""
    seeds, prompts = values.shape
    of_seeds = values.mean(axis=1, keepdims=True)
    of_prompts = values.mean(axis=0)
    noise = values - of_seeds - of_prompts + values.mean()
    freedom = (seeds - 1) * (prompts - 1)
    return max(0.0, float(of_prompts.var(ddof=1) / prompts - (noise**2).sum() / freedom / values.size))


def interval_or_none(values: Doubles) -> Interval | None:
    """Of [seeds, prompts]; None where a seed has no number."""
    return interval_of(values) if np.isfinite(values).all() else None


Value = Callable[[Report, int], float | Sequence[float]]
"""Of one arm of one seed, given the seed's report and the arm's index: a number, or one for each prompt."""


class Table:
    """Several runs of the same arms, one a seed; every seed is measured on the same prompts."""

    def __init__(self, reports: Sequence[Report], focus: str) -> None:
        self.reports = reports
        self.focus = focus
        self.arms = [arm.name for arm in reports[0].arms]
        self.finetunes = _finetunes_of_all(reports, focus)

    def of(self, value: Value) -> Doubles:
        """[arms, seeds, prompts]; one prompt for what is no mean over prompts."""
        arms = []
        for i in range(len(self.arms)):
            arms.append([np.atleast_1d(value(report, i)) for report in self.reports])
        return np.array(arms, dtype=np.float64)


def _finetunes_of_all(reports: Sequence[Report], focus: str) -> list[str]:
    """Fine-tunes after which every arm of every seed was measured on the focus task, by name."""
    measured = []
    for report in reports:
        for arm in report.arms:
            measured.append({kept.downstream for kept in arm.kept if kept.task == focus})
    return sorted(set.intersection(*measured))
