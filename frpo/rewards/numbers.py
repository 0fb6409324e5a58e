"""Numbers in text, as people and models write them: equal numbers are equal, however they are written. Linear
in the text."""

from __future__ import annotations

import re
from decimal import Context, Decimal
from itertools import product
from typing import Any

MINUS = "-\u2212\u2013\uff0d"
"""Hyphen, minus sign, en dash, full-width hyphen."""
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|(?<![\w.])\.\d+"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]])[{MINUS}+])?[$€£]?"
    rf"(?:\\[dt]?frac\{{(?P<over>\d+)\}}\{{(?P<under>\d+)\}}"
    rf"|(?P<digits>{DIGITS})(?:[eE](?P<power>[+-]?\d{{1,6}})(?!\w))?(?P<over_by>(?:/\d+)*))"
    r"(?P<percent>\s?\\?%)?"
)
"""A sign counts where nothing stands before it: the 5 of 3-5 is not negative."""
EXACT = Context(prec=50)
CLOSE = Decimal("1e-6")


def readings_of(text: str) -> tuple[Decimal, ...]:
    """What the last number in the text can mean: 50% is 50, and 0.5. Empty without a number."""
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007
        pass
    return _match_readings(last) if last else ()


def _match_readings(number: re.Match[str]) -> tuple[Decimal, ...]:
    try:
        value = _magnitude_of(number)
    except ArithmeticError:  # by zero, or out of range
        return ()
    if number["sign"] and number["sign"] in MINUS:
        value = -value
    if number["percent"]:
        return value, EXACT.divide(value, Decimal(100))
    return (value,)


def _magnitude_of(number: re.Match[str]) -> Decimal:
    """The number without its sign. Raises ArithmeticError.

    Example: 1,000 and 1e3 and 2000/2 are 1000; 24/12/2025 is a date, and counts as its last number.
    """
    if number["over"]:
        return EXACT.divide(EXACT.create_decimal(number["over"]), EXACT.create_decimal(number["under"]))
    digits = number["digits"].replace(",", "")
    power = number["power"] or "0"
    value = EXACT.create_decimal(f"{digits}E{power}")
    _, *divisors = number["over_by"].split("/")
    if not divisors:
        return value
    if len(divisors) == 1:
        return EXACT.divide(value, EXACT.create_decimal(divisors[0]))
    return EXACT.create_decimal(divisors[-1])


def any_close(ones: tuple[Decimal, ...], others: tuple[Decimal, ...]) -> bool:
    """Whether a reading of one is one of the other, to within 1e-6."""
    return any(abs(EXACT.subtract(one, other)) < CLOSE for one, other in product(ones, others))


def number_of(value: Any) -> Decimal | None:
    """The number that a value is, or that a text consists of; None for anything else, and for truth
    values."""
    if isinstance(value, bool) or value is None:
        return None
    number = NUMBER.fullmatch(str(value).strip())
    if number is None or number["percent"]:
        return None
    values = _match_readings(number)
    return values[0] if values else None


def is_same(text: str, right: Any) -> bool:
    """Whether the text is the answer: the same text, or the same number."""
    if text.strip() == str(right).strip():
        return True
    number = number_of(right)
    return number is not None and number_of(text) == number
