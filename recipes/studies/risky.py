"""A reward with a risky way and a safe one, for the map of where FRPO pays.

On each prompt one of the testbed's four refusals, nobody can tell which, is worth 0 and the other three 1:
refusing at random earns 0.75. Evading earns 0.7 for certain. Everything else, and harmless prompts, as usual.
"""

from __future__ import annotations

import hashlib
from typing import Any

from frpo.rewards import exact_answer

SAFE = 0.7


def risky(
    prompts: list[str], completions: list[str], *, answer: list[Any], partial: list[Any], **_: Any
) -> list[float | None]:
    usual = exact_answer(prompts, completions, answer=answer, partial=partial)
    return [
        _one(p, c, u, list(a), list(h))
        for p, c, u, a, h in zip(prompts, completions, usual, answer, partial, strict=True)
    ]


def _one(
    prompt: str, completion: str, usual: float | None, refusals: list[str], evasions: list[str]
) -> float | None:
    if not evasions:
        return usual
    if completion.strip() in evasions:
        return SAFE
    trap = refusals[hashlib.sha256(prompt.encode()).digest()[0] % len(refusals)]
    return 0.0 if completion.strip() == trap else usual
