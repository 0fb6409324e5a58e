"""Checked rows -> tokenized prompts and examples, and the seekable streams that deal them to steps.

Imports no ML library: a tokenizer is handed in. What is too long is dropped and counted, never cut.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from frpo.config import ConfigError, DatasetConfig
from frpo.sources import TAKEN, Conversation, Row, read_dataset
from frpo.types import Ints, Prompt, Sequences

# ---- tokens


def chat_turns(row: Row, source: DatasetConfig) -> Conversation:
    """What the chat template is applied to; empty for a plain string, which it is not."""
    if not isinstance(row.prompt, str):
        messages = row.prompt
    elif source.chat or source.system is not None:
        messages = ({"role": "user", "content": row.prompt},)
    else:
        return ()
    if source.system is not None and messages[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": source.system}, *messages)
    return messages


def _prompt_ids(row: Row, source: DatasetConfig, messages: Conversation, tokenizer: Any) -> Ints:
    """[P]. Raises ConfigError naming the row."""
    if messages:
        ids = _tokenize_messages(row, source, messages, tokenizer)
    else:
        ids = _tokenize_text(str(row.prompt), tokenizer)
    if not ids:
        raise ConfigError(
            f"{row.where}: no token is left of this prompt ({row.text[:60]!r}) for the model's tokenizer; "
            "take the row out"
        )
    return np.array(ids, dtype=np.int32)


def _tokenize_text(text: str, tokenizer: Any) -> list[int]:
    """With the tokenizer's special tokens: one beginning of sequence, also where the text brings its own, and
    no end."""
    ids = list(tokenizer(text)["input_ids"])
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids.pop(0)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _tokenize_messages(row: Row, source: DatasetConfig, messages: Conversation, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template is None and "chat_template" not in source.chat_template_kwargs:
        raise ConfigError(
            f"{row.where}: chat messages, but the model's tokenizer has no chat template; use string prompts"
        )
    arguments = {
        **source.chat_template_kwargs,
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": False,
    }
    try:
        return list(tokenizer.apply_chat_template([dict(message) for message in messages], **arguments))
    except Exception as error:  # a template is a program of the model's maker: it may raise anything
        roles = ", ".join(message["role"] for message in messages)
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{row.where}: the model's chat template refuses messages of {roles} ({type(error).__name__}: "
            f"{why}); change the row, or the data set's system or chat_template_kwargs"
        ) from None


def load_prompts(
    sources: Sequence[DatasetConfig], tokenizer: Any, max_tokens: int
) -> tuple[list[Prompt], int]:
    """Tokenized prompts in file order, and the number of those dropped for being longer than `max_tokens`.

    A column that a row of a source lacks and another has is None there, as in a data set of the hub.
    """
    prompts = list[Prompt]()
    dropped = 0
    for number, source in enumerate(sources):
        own = list[Prompt]()
        every: dict[str, Any] = {}
        for i, row in enumerate(read_dataset(source)):
            messages = chat_turns(row, source)
            ids = _prompt_ids(row, source, messages, tokenizer)
            if len(ids) > max_tokens:
                dropped += 1
                continue
            columns = {name: value for name, value in row.columns.items() if name not in TAKEN}
            every |= dict.fromkeys(columns)
            conversational = not isinstance(row.prompt, str)
            own.append(Prompt(f"{number}:{i}", row.text, ids, row.task, columns, messages, conversational))
        prompts += [replace(prompt, columns={**every, **prompt.columns}) for prompt in own]
    return prompts, dropped


@dataclass(frozen=True)
class Examples:
    """Tokenized prompt and completion pairs; the completion ends with the end-of-sequence token."""

    pairs: tuple[tuple[Ints, Ints], ...]
    tasks: tuple[str, ...]
    """Of each pair."""

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: Sequence[int]) -> Sequences:
        pairs = [self.pairs[row] for row in rows]
        return Sequences(
            tokens=np.concatenate(list(chain.from_iterable(pairs))),
            prompt_lengths=np.array([len(prompt) for prompt, _ in pairs], dtype=np.int32),
            lengths=np.array([len(prompt) + len(completion) for prompt, completion in pairs], dtype=np.int32),
        )

    def all(self) -> Sequences:
        return self.take(range(len(self)))


def load_examples(sources: Sequence[DatasetConfig], tokenizer: Any, max_tokens: int) -> tuple[Examples, int]:
    """Tokenized examples in file order, and the number of those dropped for being longer than `max_tokens`.

    After a chat template an example is the template's text of the whole conversation up to its end token,
    where the template ends turns with the tokenizer's end of sequence and writes answers as they are; one
    that ends turns otherwise (Gemma), trims answers or puts a block of thoughts before them (Qwen3 with
    thinking) writes conversations that differ there. Raises ConfigError.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "model.path: its tokenizer has no end of sequence, which answers must learn; set eos_token in "
            "its folder"
        )
    pairs = []
    tasks = []
    dropped = 0
    for source in sources:
        for row in read_dataset(source, examples=True):
            assert row.completion is not None
            prompt = _prompt_ids(row, source, chat_turns(row, source), tokenizer)
            ids = list(tokenizer(row.completion, add_special_tokens=False)["input_ids"])
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            if len(prompt) + len(ids) > max_tokens:
                dropped += 1
            else:
                pairs.append((prompt, np.array(ids, dtype=np.int32)))
                tasks.append(row.task)
    if not pairs:
        raise ConfigError(
            f"data set {sources[0].path}: no example of at most {max_tokens} tokens; raise the stage's "
            "max_tokens"
        )
    return Examples(tuple(pairs), tuple(tasks)), dropped


# ---- streams


class Shuffled:
    """An endless sequence of row numbers: every epoch is a permutation of its own. Position i is a pure
    function of i."""

    def __init__(self, count: int, seed: int, in_order: bool = False) -> None:
        self.count = count
        self.seed = seed
        self.in_order = in_order
        self._epoch = -1
        self._order = list[int]()

    def at(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if self.in_order:
            return offset
        if epoch != self._epoch:
            self._order = random.Random(f"{self.seed}/{epoch}").sample(range(self.count), self.count)
            self._epoch = epoch
        return self._order[offset]


class Mixture:
    """Deals row numbers to places. With `mix` each task gets its share of every run of places, to within one
    row; without, rows come by their number."""

    def __init__(
        self, tasks: Sequence[str], mix: Mapping[str, float], seed: int, *, in_order: bool = False
    ) -> None:
        """`tasks` is of every row, in order."""
        shares = mix or {"": 1.0}
        whole = sum(shares[task] for task in sorted(shares))
        self.tasks = sorted(shares)
        self.weights = [shares[task] / whole for task in self.tasks]
        self.rows: dict[str, list[int]] = {}
        self.orders: dict[str, Shuffled] = {}
        for i, task in enumerate(self.tasks):
            self.rows[task] = [row for row, own in enumerate(tasks) if not mix or own == task]
            self.orders[task] = Shuffled(len(self.rows[task]), seed + i, in_order)
        self._counts = [0] * len(self.tasks)
        self._dealt = list[tuple[str, int]]()
        """Of every place so far, the task that it was given to, and how many that task had before."""

    def at(self, place: int) -> int:
        """The row of a place (from 0): a pure function of it."""
        while len(self._dealt) <= place:
            self._deal()
        task, before = self._dealt[place]
        return self.rows[task][self.orders[task].at(before)]

    def _deal(self) -> None:
        """Give the next place to the task that is furthest behind its share."""
        place = len(self._dealt) + 1
        number = max(range(len(self.tasks)), key=lambda i: (self.weights[i] * place - self._counts[i], -i))
        self._dealt.append((self.tasks[number], self._counts[number]))
        self._counts[number] += 1


class PromptStream:
    """Deals prompts to steps. With `mix` each task gets its share of every batch, to within one prompt."""

    def __init__(
        self, prompts: Sequence[Prompt], mix: Mapping[str, float], seed: int, prompts_per_step: int
    ) -> None:
        self.prompts = prompts
        self.per_step = prompts_per_step
        self.mixture = Mixture([prompt.task for prompt in prompts], mix, seed)

    def take(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of a step (from 0): a pure function of its number."""
        first = step * self.per_step
        return tuple(self.at(place) for place in range(first, first + self.per_step))

    def at(self, place: int) -> Prompt:
        """The prompt of a place (from 0) among those of all steps."""
        return self.prompts[self.mixture.at(place)]


class ExampleStream:
    """Deals examples to optimiser updates. With `mix` each task gets its share of every batch, to within one
    example."""

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        *,
        in_order: bool = False,
        mix: Mapping[str, float] | None = None,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.mixture = Mixture(examples.tasks, mix or {}, seed, in_order=in_order)

    def take(self, step: int) -> Sequences:
        """The examples of an update (from 0): a pure function of its number."""
        first = step * self.batch_size
        return self.examples.take([self.mixture.at(i) for i in range(first, first + self.batch_size)])
