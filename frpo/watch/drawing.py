"""Curves as points of an SVG that is stretched to the width it is given; its texts stand beside it in the
page's own size. No more points than a screen shows, whatever the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from frpo.records import Record

MOST_POINTS = 120
"""Of all curves of a panel: each the mean of the steps that it stands for, so that many stay legible."""
FEWEST_POINTS = 30
"""Of a curve."""
NUM_STYLES = 8
"""Of curves; the ninth looks like the first again."""

ALIKE = 1e-9
"""Share of the largest value that values differ by at least, where an axis is made of their differences."""
NOTHING = 1e-12
"""A difference, or a value, that is drawn as none."""

Point = tuple[float, float]


class ArmCurve(Record):
    name: str
    style: int
    """Colour and dashes, the same for an arm in every panel."""
    points: str
    """Of an SVG polyline, 0 to 100 from left to right and from top to bottom."""
    end: Point
    last: str
    """The last value in words."""


class Tick(Record):
    at: float
    """0 to 100, as points."""
    text: str


class LivePanel(Record):
    title: str
    across: str
    """What goes from left to right."""
    curves: tuple[ArmCurve, ...]
    left: tuple[Tick, ...]
    below: tuple[Tick, ...]


@dataclass(frozen=True)
class Line:
    """What a curve is drawn of."""

    name: str
    style: int
    points: Sequence[Point]
    """Without what was not measured."""


def draw_panel(title: str, across: str, lines: Sequence[Line]) -> LivePanel | None:
    """Lines on common axes; None where none has a point."""
    most = max(FEWEST_POINTS, MOST_POINTS // max(1, len(lines)))
    thin = {line.name: thin_out(line.points, most) for line in lines if line.points}
    points = list(chain.from_iterable(thin.values()))
    if not points:
        return None
    x_ticks, x_low, x_high = choose_ticks([x for x, _ in points])
    y_ticks, y_low, y_high = choose_ticks([y for _, y in points])

    def place(point: Point) -> Point:
        x, y = point
        return _share(x, x_low, x_high), 100 - _share(y, y_low, y_high)

    curves = []
    for line in lines:
        if line.points:
            placed = [place(point) for point in thin[line.name]]
            text = " ".join(f"{x:g},{y:g}" for x, y in placed)
            last = format_value(line.points[-1][1])
            curves.append(ArmCurve(name=line.name, style=line.style, points=text, end=placed[-1], last=last))
    left = tuple(Tick(at=place((0, y))[1], text=format_value(y)) for y in y_ticks)
    below = tuple(Tick(at=place((x, 0))[0], text=format_value(x)) for x in x_ticks)
    return LivePanel(title=title, across=across, curves=tuple(curves), left=left, below=below)


def thin_out(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points, each the mean of as many neighbours; the last may have fewer."""
    width = math.ceil(len(points) / most)
    if width <= 1:
        return list(points)
    buckets = [points[first : first + width] for first in range(0, len(points), width)]
    return [(fmean(xs), fmean(ys)) for xs, ys in (zip(*bucket, strict=True) for bucket in buckets)]


def choose_ticks(values: Sequence[float], intervals: int = 4) -> tuple[list[float], float, float]:
    """Round numbers about the values, and where the axis begins and ends: at or around the outermost ones.

    Example: 0.13, 0.94 give 0, 0.2, ... 1.0 for five intervals.
    """
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low < max(ALIKE * size, NOTHING):
        half = 0.5 * size if size > NOTHING else 0.5
        low, high = low - half, high + half
    rough = (high - low) / intervals
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return ticks, ticks[0], ticks[-1]


def _share(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 2)


def format_value(value: float) -> str:
    """At most four digits, and no exponent where a person reads none."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, max(0, 2 - math.floor(math.log10(size)))):g}"
