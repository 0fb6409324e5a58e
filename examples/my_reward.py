"""A reward of your own. A recipe names it by file and function: examples/my_reward.py:shared_words."""

from __future__ import annotations

from typing import Any


def shared_words(
    prompts: list[str], completions: list[str], *, answer: list[Any], **columns: Any
) -> list[float | None]:
    """Share of the words of the nearest right answer that stand in the completion, 0 to 1.

    `answer` is a column of the data: for each completion the right answers of its row. None says that the
    reward has nothing to say of a row; an error would be a failed reward of that completion alone.
    """
    return [share_of(text, answers) for text, answers in zip(completions, answer, strict=True)]


def share_of(text: str, answers: list[str] | None) -> float | None:
    if not answers:
        return None
    words = set(text.split())
    return max(len(words & set(right.split())) / len(set(right.split())) for right in answers)
