"""What Python reads as JSON and RFC 8259 is against, refused: a name that stands twice in an object, NaN and
infinities, numbers beyond a double."""

from __future__ import annotations

import math
from typing import Any


class NotStrict(ValueError):
    """`rule` is what is broken; the whole message ends with the text that breaks it."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotStrict("a name stands twice in one object", repr(twice))
    return entries


def _refuse_constant(name: str) -> float:
    raise NotStrict("NaN and infinities are not JSON, write null", name)


def _parse_finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise NotStrict("a number is more than a double holds", digits[:40])
    return number


HOOKS: dict[str, Any] = {
    "object_pairs_hook": _refuse_twice,
    "parse_constant": _refuse_constant,
    "parse_float": _parse_finite,
}
"""Of `json.loads` and `json.JSONDecoder`."""
