"""What a loop that runs ahead had drawn, in a checkpoint: numbers in safetensors, words in JSON. The prompts
are not written: they follow from their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file, save_file

from frpo.checkpoint import Saved
from frpo.driver import Prompts, Start, Step
from frpo.roles import Learner, Writing
from frpo.types import Completion, FinishReason, Flight, Group

NUMBERS = "flight.safetensors"
WORDS = "flight.json"


class Words(BaseModel):
    """A flight but for the numbers of its tokens; lists by group, and by completion in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begun: int
    waiting: tuple[int, ...]
    groups: tuple[int, ...]
    """Numbers of their prompts."""
    texts: tuple[tuple[str, ...], ...]
    finish_reasons: tuple[tuple[FinishReason, ...], ...]


def write_flight(folder: Path, flight: Flight) -> None:
    completions = list(chain.from_iterable(group.completions for group in flight.groups))
    words = Words(
        begun=flight.begun,
        waiting=flight.waiting,
        groups=tuple(group.index for group in flight.groups),
        texts=tuple(tuple(c.text for c in group.completions) for group in flight.groups),
        finish_reasons=tuple(tuple(c.finish_reason for c in group.completions) for group in flight.groups),
    )
    (folder / WORDS).write_text(words.model_dump_json())
    numbers = {
        "lengths": np.array([len(c.token_ids) for c in completions], dtype=np.int32),
        "tokens": np.concatenate([np.zeros(0, np.int32), *(c.token_ids for c in completions)]),
        "logprobs": np.concatenate([np.zeros(0, np.float32), *(c.logprobs for c in completions)]),
        "versions": np.concatenate([np.zeros(0, np.int32), *(c.versions for c in completions)]),
    }
    save_file(numbers, folder / NUMBERS)


def read_flight(folder: Path, prompts: Prompts) -> Flight | None:
    """None where the checkpoint has none."""
    if not (folder / WORDS).exists():
        return None
    words = Words.model_validate_json((folder / WORDS).read_text())
    completions = _read_completions(folder, words)
    groups = []
    for number, texts in zip(words.groups, words.texts, strict=True):
        groups.append(Group(number, prompts.at(number), tuple(islice(completions, len(texts)))))
    return Flight(words.begun, words.waiting, tuple(groups))


def _read_completions(folder: Path, words: Words) -> Iterator[Completion]:
    numbers = load_file(folder / NUMBERS)
    ends = np.cumsum(numbers["lengths"])[:-1]
    parts: Sequence[Sequence[np.ndarray]] = [
        np.split(numbers[name], ends) for name in ("tokens", "logprobs", "versions")
    ]
    texts, reasons = chain.from_iterable(words.texts), chain.from_iterable(words.finish_reasons)
    for tokens, logprobs, versions, text, reason in zip(*parts, texts, reasons, strict=False):
        yield Completion(tokens, logprobs, versions, text, reason)


def begun_from(saved: Saved, prompts: Prompts) -> Start:
    """Where a loop stood at a checkpoint."""
    progress = saved.progress
    assert progress.steering is not None, saved.path
    return Start(progress.step, progress.steering, read_flight(saved.path, prompts))


def save_loop(learner: Learner, done: Step, folder: Path) -> Writing:
    """Of a checkpoint, the ranks' files and what is drawn ahead."""
    if done.flight:
        write_flight(folder, done.flight)
    return learner.save(folder / "engine")
