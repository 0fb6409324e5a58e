"""A number of every seed: mean, and Student's t interval where there are seeds enough for one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from frpo.records import Record

LEAST_SEEDS = 5
"""Of an interval: fewer say nothing of others, and their values stand alone."""
QUANTILES = (
    2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 4 degrees of freedom and more."""
Z975 = 1.95996


class Spread(Record):
    mean: float
    lo: float | None
    hi: float | None
    """Of the 95 % interval of the mean over seeds; None below five seeds."""
    values: tuple[float, ...]
    """Of each seed."""


def spread_of(values: Sequence[float]) -> Spread:
    """Raises ValueError for none."""
    mean = statistics.fmean(values)
    if len(values) < LEAST_SEEDS:
        return Spread(mean=mean, lo=None, hi=None, values=tuple(values))
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Spread(mean=mean, lo=mean - half, hi=mean + half, values=tuple(values))


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; beyond the table two terms of its expansion in 1 / freedom."""
    if freedom < LEAST_SEEDS + len(QUANTILES) - 1:
        return QUANTILES[freedom - LEAST_SEEDS + 1]
    first = (Z975**3 + Z975) / 4
    second = (5 * Z975**5 + 16 * Z975**3 + 3 * Z975) / 96
    return Z975 + first / freedom + second / freedom**2
