"""A number of every seed: its interval, and the values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frpo.report.intervals import Interval, interval_of


class Spread(Interval):
    values: tuple[float, ...]
    """Of each seed."""


def spread_of(values: Sequence[float]) -> Spread:
    """Mean over seeds, with Student's t interval where there are seeds enough for one."""
    interval = interval_of(np.array([[value] for value in values]))
    return Spread(mean=interval.mean, lo=interval.lo, hi=interval.hi, values=tuple(values))
