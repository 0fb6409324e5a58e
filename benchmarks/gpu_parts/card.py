"""The card: whether there is one, what is used of it, and how long a call keeps it busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def used_gib() -> float:
    """Of the card, by all processes."""
    import torch

    if not has_card():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**30, 2)


def time_call(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds until the card is done, and what the call returned."""
    import torch

    if has_card():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if has_card():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result
