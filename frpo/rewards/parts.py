"""What a reward found for one completion: a value, a failure with its reason, or nothing, because it does not
apply to the row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from frpo.config import RewardConfig

Part = tuple[float | None, str | None]
"""A value; or None and why it failed; or None and None where the reward does not apply to the row."""

LARGEST = 3.4028234e38
"""Of float32, in which the learner computes."""
REASON_CHARS = 500


def describe_error(error: BaseException) -> str:
    """What an error says, of a length for a message, in characters that UTF-8 has."""
    try:
        text = str(error)
    except Exception:  # the error is the user's, and so is its __str__
        text = ""
    return f"{type(error).__name__}: {text}"[:REASON_CHARS].encode(errors="backslashreplace").decode()


def values_of(answer: Any, count: int) -> list[Any]:
    """One value per completion from what a function returned: a list, tuple, generator, array or tensor ([N]
    or [N, 1]), or OpenRLHF's dict with "rewards". At most one value too many, since a generator need not end.
    Raises TypeError for what holds no values."""
    if isinstance(answer, Mapping):
        answer = answer["rewards"]
    if hasattr(answer, "tolist"):  # numpy, torch, pandas
        answer = answer.tolist()
    if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
        raise TypeError(f"gave a {type(answer).__name__}, not one value per completion")
    return list(itertools.islice(answer, count + 1))


def part_of(value: Any, reward: RewardConfig) -> Part:
    """The value less `center`, in units of `scale`; an exception in place of a value is a failure."""
    if isinstance(value, BaseException):
        return None, describe_error(value)
    plain = _to_scalar(value)
    if plain is None:
        return None, None
    if isinstance(plain, str | bytes):
        return None, f"gave {plain[:60]!r}, which is no number"
    try:
        number = (float(plain) - reward.center) / reward.scale
    except OverflowError:
        return None, f"gave a number beyond {LARGEST:.2g}"
    except Exception:  # any type may come back, with any __float__
        return None, f"gave a {type(plain).__name__}, which is no number"
    return in_range(number)


def in_range(number: float) -> Part:
    """The number as a part: a failure where it is none, or too large."""
    if math.isfinite(number) and abs(number) <= LARGEST:
        return number, None
    if math.isfinite(number):
        return None, f"gave {number:.3g}, a number beyond {LARGEST:.2g}"
    return None, f"gave {number}"


def _to_scalar(value: Any) -> Any:
    """A scalar out of its tensor, array, numpy type or list of one."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value
