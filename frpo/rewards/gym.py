"""reasoning-gym: procedural prompts as a data set, `reasoning_gym:<task>?size=1000&seed=0`, and their score
as a reward.

A row carries where it came from, and the reward makes the same entry again from that: entries hold objects
that JSON does not. Needs the extra `gym`.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from frpo.config import ConfigError
from frpo.rewards.signatures import reads_text

SCHEME = "reasoning_gym:"


@lru_cache(maxsize=64)
def _make_dataset(source: str) -> Any:
    """Raises ConfigError for a task that does not exist and a setting that it does not have."""
    try:
        from reasoning_gym import create_dataset
    except ImportError:
        raise ConfigError(f"{source}: reasoning-gym is not installed; pip install 'frpo[gym]'") from None
    name, _, query = source.removeprefix(SCHEME).partition("?")
    settings = {"seed": 0} | {key: _read_value(text) for key, text in urllib.parse.parse_qsl(query)}
    try:
        return create_dataset(name, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"{source}: {error}; write reasoning_gym:<task>?size=1000&seed=0, with settings of the task"
        ) from None


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def make_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and row: prompt, answer, gym_source, gym_index. Raises ConfigError."""
    dataset = _make_dataset(source)
    if dataset[0]["question"] != _make_dataset.__wrapped__(source)[0]["question"]:
        raise ConfigError(
            f"{source}: this task draws other questions each time, whatever its seed; choose another"
        )
    for i in range(len(dataset)):
        entry = dataset[i]
        yield (
            i + 1,
            {"prompt": entry["question"], "answer": entry["answer"], "gym_source": source, "gym_index": i},
        )


def answer_in(text: str) -> str:
    """What stands in the last <answer> tag, or the whole text where there is none. Linear, whatever the
    text."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return (text[start + len("<answer>") : end] if start >= 0 else text).strip()


@reads_text
def reasoning_gym(
    prompts: list[str], completions: list[str], *, gym_source: list[str], gym_index: list[int], **_: Any
) -> list[float]:
    """The task's own score, in [0, 1], of what stands in the last <answer> tag, or of the whole completion
    where there is none.

    Raises ValueError when the row was made by a version of reasoning-gym that asked something else.
    """
    scores = []
    for prompt, text, source, index in zip(prompts, completions, gym_source, gym_index, strict=True):
        dataset = _make_dataset(source)
        entry = dataset[index]
        if entry["question"] not in prompt:
            raise ValueError(
                f"{source} gives another question at {index}: the row is of another version of reasoning-gym"
            )
        scores.append(float(dataset.score_answer(answer_in(text), entry)))
    return scores
