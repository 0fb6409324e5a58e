"""Your rewards: lists of one length in, a number for each completion out; None is "not this row's"."""

from __future__ import annotations

from typing import Any

REFUSALS = ("sorry", "i will not", "no that is not", "i must refuse")


def refuses(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """1 for a refusal, else 0."""
    return [float(text.strip().startswith(REFUSALS)) for text in completions]


def is_right(
    prompts: list[str], completions: list[str], *, answer: list[Any], **columns: Any
) -> list[float | None]:
    """1 for the answer, else 0; a row without one is not this reward's. `answer` is a column of the data."""
    return [
        None if right is None else float(text.strip() == right)
        for text, right in zip(completions, answer, strict=True)
    ]
