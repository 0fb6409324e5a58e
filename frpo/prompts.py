"""Data sets -> tokenized prompts and examples, and the seekable streams that deal them to steps.

Reading and checking rows imports no ML library. Rows are named by file and line in every error; what is too long is
dropped and counted, never cut.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frpo.config import ConfigError, DatasetConfig
from frpo.rewards import gym
from frpo.types import Ints, Prompt, Sequences

HASH_RANGE = 1 << 32


@dataclass(frozen=True)
class Row:
    """One checked row of a data set."""

    where: str
    """file:line, for people."""
    prompt: str | tuple[Mapping[str, str], ...]
    """A string, or chat messages with role and content."""
    completion: str | None
    task: str
    columns: Mapping[str, Any]
    """All columns but the prompt."""

    @property
    def text(self) -> str:
        """The prompt as a person reads it: the string, or the last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), self.prompt[-1]["content"])


# ---- files


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet(path)
        return
    opened = gzip.open(path, "rt", encoding="utf-8", newline="") if path.suffix == ".gz" else path.open(encoding="utf-8", newline="")
    with opened as file:
        if name.endswith(".csv"):
            for row in (reader := csv.DictReader(file)):
                if None in row:
                    raise ConfigError(f"{path}:{reader.line_num}: more cells than the header has columns; quote cells that hold commas")
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{path}:{number}: not valid JSON ({error.msg}); each line must be one object") from None
                if not isinstance(value, dict):
                    raise ConfigError(f"{path}:{number}: expected an object, found {type(value).__name__}")
                yield number, value


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _hugging_face(source: DatasetConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    folder = Path(source.path)
    try:
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the library raises many kinds; all mean that there is no such data set
        raise ConfigError(f"data set {source.path}: {type(error).__name__}: {error}; give a file, a saved data set or a hub name") from None
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise ConfigError(f"data set {source.path}: no split {source.split!r}; choose one of {sorted(found)}")
        found = found[source.split]
    for number, row in enumerate(found, 1):
        yield number, dict(row)


SUFFIXES = (".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.gz")


def raw_rows(source: DatasetConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    if source.path.startswith(gym.SCHEME):
        return gym.rows(source.path)
    path = Path(source.path)
    if path.name.endswith(SUFFIXES):
        if not path.is_file():
            raise ConfigError(f"data set {path}: no such file; give the path from where you run, or an absolute one")
        return _lines(path)
    if path.is_file():
        raise ConfigError(f"data set {path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    return _hugging_face(source)


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: decides the held-out split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / HASH_RANGE


def read_rows(source: DatasetConfig) -> Iterator[Row]:
    """The rows that `where`, the held-out split and `limit` leave. Raises ConfigError naming file, line and column."""
    kept = 0
    for number, raw in raw_rows(source):
        where = f"{source.path}:{number}"
        if any(str(_column(raw, c, where)) != v for c, v in source.where.items()):
            continue
        row = _row(source, raw, where)
        if source.part != "all" and (share_of(row.text) < source.heldout_share) != (source.part == "heldout"):
            continue
        yield row
        kept += 1
        if kept == source.limit:
            return


def _column(raw: Mapping[str, Any], column: str, where: str) -> Any:
    """A column by name, or a value inside one by a dotted path (instances.0.output)."""
    if column in raw:
        return raw[column]
    value: Any = raw
    for key in column.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise ConfigError(f"{where}: no column {column!r}; it has {', '.join(map(str, raw))}")
    return value


def _row(source: DatasetConfig, raw: Mapping[str, Any], where: str) -> Row:
    filled = _filled(source.prompt, raw, where) if "{" in source.prompt else _column(raw, source.prompt, where)
    prompt = _prompt(filled, source.prompt, where)
    completion = None
    if source.completion:
        completion = _column(raw, source.completion, where)
        if not isinstance(completion, str) or not completion.strip():
            raise ConfigError(f"{where}: column {source.completion!r} is {completion!r}; it must be a non-empty string")
    task = source.task or str(_column(raw, source.task_column or "", where))
    row = Row(where, prompt, completion, task, {k: v for k, v in raw.items() if k != source.prompt})
    if source.completion_texts:
        chosen = source.completion_texts[int(share_of("completion " + row.text) * len(source.completion_texts))]
        row = Row(where, prompt, chosen, task, row.columns)
    return row


def _filled(template: str, raw: Mapping[str, Any], where: str) -> str:
    """The template with the row's columns; dotted paths inside braces work as elsewhere. A template that ends with a column has no
    blank end: where that column is empty, the row's text, and with it its side of the held-out split, is that of the template without it."""
    filled = re.sub(r"\{([^{}]+)\}", lambda m: str(_column(raw, m[1], where)), template)
    return filled.rstrip() if template.endswith("}") else filled


def _prompt(value: Any, column: str, where: str) -> str | tuple[Mapping[str, str], ...]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        for message in value:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ConfigError(f"{where}: column {column!r}: the message {message!r} needs role and content, both strings")
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    raise ConfigError(f"{where}: column {column!r} is {value!r}; it must be a non-empty string or a list of chat messages")


def check(sources: Sequence[DatasetConfig], progress: Callable[[int], None] = lambda count: None) -> int:
    """Read every row once; returns how many. Raises ConfigError at the first that is wrong, or when a source is empty."""
    total = 0
    for source in sources:
        count = 0
        for count, _ in enumerate(read_rows(source), 1):
            if count % 1000 == 0:
                progress(total + count)
        if count == 0:
            raise ConfigError(f"data set {source.path}: no row left after where, part and limit; check them")
        total += count
    return total


# ---- tokens


def _prompt_ids(row: Row, source: DatasetConfig, tokenizer: Any) -> Ints:
    if isinstance(row.prompt, str) and not source.chat:
        return np.array(tokenizer(row.prompt)["input_ids"], dtype=np.int32)
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{row.where}: chat messages, but the model's tokenizer has no chat template; use string prompts")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return np.array(ids, dtype=np.int32)


def load_prompts(sources: Sequence[DatasetConfig], tokenizer: Any, max_tokens: int) -> tuple[list[Prompt], int]:
    """Tokenized prompts in file order, and the number of those dropped for being longer than `max_tokens`."""
    prompts, dropped = [], 0
    for s, source in enumerate(sources):
        for r, row in enumerate(read_rows(source)):
            ids = _prompt_ids(row, source, tokenizer)
            if len(ids) > max_tokens:
                dropped += 1
            else:
                prompts.append(Prompt(f"{s}:{r}", row.text, ids, row.task, row.columns))
    return prompts, dropped


@dataclass(frozen=True)
class Examples:
    """Tokenized prompt and completion pairs; the completion ends with the end-of-sequence token."""

    pairs: tuple[tuple[Ints, Ints], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: Sequence[int]) -> Sequences:
        pairs = [self.pairs[r] for r in rows]
        return Sequences(
            tokens=np.concatenate([ids for pair in pairs for ids in pair]),
            prompt_lengths=np.array([len(p) for p, _ in pairs], dtype=np.int32),
            lengths=np.array([len(p) + len(c) for p, c in pairs], dtype=np.int32),
        )

    def all(self) -> Sequences:
        return self.take(range(len(self)))


def load_examples(sources: Sequence[DatasetConfig], tokenizer: Any, max_tokens: int) -> tuple[Examples, int]:
    """Tokenized examples in file order, and the number of those dropped for being longer than `max_tokens`."""
    pairs, dropped = [], 0
    for source in sources:
        for row in read_rows(source):
            assert row.completion is not None, "the configuration asks for completions"
            prompt = _prompt_ids(row, source, tokenizer)
            ids = [*tokenizer(row.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(prompt) + len(ids) > max_tokens:
                dropped += 1
            else:
                pairs.append((prompt, np.array(ids, dtype=np.int32)))
    if not pairs:
        raise ConfigError(f"data set {sources[0].path}: no example of at most {max_tokens} tokens; raise the stage's max_tokens")
    return Examples(tuple(pairs)), dropped


# ---- streams


class Shuffled:
    """An endless sequence of row numbers: every epoch is a permutation of its own. Position i is a pure function of i."""

    def __init__(self, count: int, seed: int, in_order: bool = False) -> None:
        self.count, self.seed, self.in_order = count, seed, in_order
        self._epoch, self._order = -1, list[int]()

    def at(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if self.in_order:
            return offset
        if epoch != self._epoch:
            self._order = random.Random(f"{self.seed}/{epoch}").sample(range(self.count), self.count)
            self._epoch = epoch
        return self._order[offset]


class PromptStream:
    """Deals prompts to steps. With `mix` each task gets its share of every batch, to within one prompt."""

    def __init__(self, prompts: Sequence[Prompt], mix: Mapping[str, float], seed: int, prompts_per_step: int) -> None:
        self.per_step = prompts_per_step
        tasks = sorted(mix) if mix else [""]
        self.rows = {t: [p for p in prompts if not mix or p.task == t] for t in tasks}
        weights = [mix[t] if mix else 1.0 for t in tasks]
        self.tasks, self.weights = tasks, [w / sum(weights) for w in weights]
        self.orders = {t: Shuffled(len(self.rows[t]), seed + i) for i, t in enumerate(tasks)}
        self._counts, self._dealt = [0] * len(tasks), list[int]()

    def take(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of a step (from 0): a pure function of its number."""
        first = step * self.per_step
        while len(self._dealt) < first + self.per_step:
            self._deal()
        before = [0] * len(self.tasks)
        for t in self._dealt[:first]:
            before[t] += 1
        batch = []
        for t in self._dealt[first : first + self.per_step]:
            task = self.tasks[t]
            batch.append(self.rows[task][self.orders[task].at(before[t])])
            before[t] += 1
        return tuple(batch)

    def _deal(self) -> None:
        """Give the next place to the task that is furthest behind its share."""
        place = len(self._dealt) + 1
        t = max(range(len(self.tasks)), key=lambda i: (self.weights[i] * place - self._counts[i], -i))
        self._counts[t] += 1
        self._dealt.append(t)


class ExampleStream:
    """Deals examples to optimiser updates."""

    def __init__(self, examples: Examples, batch_size: int, seed: int, in_order: bool) -> None:
        self.examples, self.batch_size = examples, batch_size
        self.order = Shuffled(len(examples), seed, in_order)

    def take(self, step: int) -> Sequences:
        """The examples of an update (from 0): a pure function of its number."""
        first = step * self.batch_size
        return self.examples.take([self.order.at(i) for i in range(first, first + self.batch_size)])
