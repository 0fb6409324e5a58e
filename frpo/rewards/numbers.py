"""Numbers in text, as people and models write them: equal numbers are equal, however they are written. Linear
in the text."""

from __future__ import annotations

import re
from decimal import Context, Decimal
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


def readings(text: str) -> tuple[Decimal, ...]:
    """What the last number in the text can mean: 50% is 50, and 0.5. Empty without a number."""
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007
        pass
    return _readings(last) if last else ()


def _readings(found: re.Match[str]) -> tuple[Decimal, ...]:
    try:
        if found["over"]:
            value = EXACT.divide(EXACT.create_decimal(found["over"]), EXACT.create_decimal(found["under"]))
        else:
            value = EXACT.create_decimal(
                found["digits"].replace(",", "") + (f"E{found['power']}" if found["power"] else "")
            )
            _, *divisors = found["over_by"].split("/")
            if len(divisors) == 1:
                value = EXACT.divide(value, EXACT.create_decimal(divisors[0]))
            elif divisors:  # a date: its last number
                value = EXACT.create_decimal(divisors[-1])
    except ArithmeticError:  # by zero, or out of range
        return ()
    value = -value if found["sign"] and found["sign"] in MINUS else value
    return (value, EXACT.divide(value, Decimal(100))) if found["percent"] else (value,)


def close(a: tuple[Decimal, ...], b: tuple[Decimal, ...]) -> bool:
    """Whether a reading of one is one of the other, to within 1e-6."""
    return any(abs(EXACT.subtract(x, y)) < CLOSE for x in a for y in b)


def number_of(value: Any) -> Decimal | None:
    """The number that a value is, or that a text consists of; None for anything else, and for truth
    values."""
    if isinstance(value, bool) or value is None:
        return None
    text = str(value).strip()
    found = NUMBER.fullmatch(text)
    if found is None or found["percent"]:
        return None
    values = _readings(found)
    return values[0] if values else None


def same(text: str, right: Any) -> bool:
    """Whether the text is the answer: the same text, or the same number."""
    if text.strip() == str(right).strip():
        return True
    number = number_of(right)
    return number is not None and number_of(text) == number
