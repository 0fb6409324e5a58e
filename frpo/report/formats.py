"""How pages and cards write a number; a dash where there is none."""

from __future__ import annotations

from frpo.records import Estimate
from frpo.report.intervals import Interval
from frpo.report.spread import Spread

MISSING = "–"


def format_number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:z,.{digits}f}"


def format_level(value: Estimate | Interval | Spread | None) -> str:
    return MISSING if value is None else f"{value:z.2f}"


def format_difference(value: Interval | None) -> str:
    return MISSING if value is None else f"{value:+.3f}"
