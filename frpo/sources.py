"""Raw rows -> checked rows: prompt, completion, task and columns, the held-out split, and what training
shares with it.

Imports no ML library. Every error names the row by file and line.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from frpo.config import ConfigError, DatasetConfig
from frpo.config.data import pieces
from frpo.files import Place, Raw, raw_rows

HASH_RANGE = 1 << 32
ROLES = ("system", "developer", "user", "assistant", "tool")
TAKEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Names by which reward functions get something else than a column: such columns are noted, and kept from
them."""
MAX_OVERLAP = 0.5
"""Share of the held-out prompts that may be training prompts too; above it nothing is held out in earnest."""

LISTS = (list, tuple)
Message = Mapping[str, str]
Conversation = tuple[Message, ...]


class Row(NamedTuple):
    """One checked row of a data set."""

    where: Place
    prompt: str | Conversation
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
        return next(
            (m["content"] for m in reversed(self.prompt) if m["role"] == "user"), self.prompt[-1]["content"]
        )


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: decides the held-out split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / HASH_RANGE


def normal(text: str) -> str:
    """The text without what makes no other prompt of it: case, blanks, Unicode form (NFKC), a last mark (. ?
    !)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.lower()
    if "  " in text or not text.isprintable():  # of all blanks, the space alone is printable
        text = " ".join(text.split())
    return text.lstrip().rstrip(" .?!")


def read_rows(source: DatasetConfig, examples: bool = False) -> Iterator[Row]:
    """The rows that `where`, the held-out split and `limit` leave; `examples` are fine-tuned on, so that each
    has a completion.

    The side of the split is a hash of the prompt as it is written; one that is `normal`-equal to an earlier
    prompt of the file follows that one. Raises ConfigError naming file, line and column.
    """
    template = pieces(source.prompt) if {"{", "}"} & set(source.prompt) else None
    sides: dict[str, bool] = {}
    kept = 0
    for where, raw in raw_rows(source):
        if source.where and any(str(_column(raw, c, where)) != v for c, v in source.where.items()):
            continue
        row = _row(source, template, raw, where, examples)
        if source.part != "all":
            heldout = sides.setdefault(normal(row.text), share_of(row.text) < source.heldout_share)
            if heldout != (source.part == "heldout"):
                continue
        yield row
        kept += 1
        if kept == source.limit:
            return


# ---- one row


def _row(
    source: DatasetConfig, template: list[tuple[str, str]] | None, raw: Raw, where: Place, examples: bool
) -> Row:
    found = _filled(template, raw, where) if template else _column(raw, source.prompt, where)
    prompt = _prompt(found, source.prompt, where)
    completion = (
        _completion(_column(raw, source.completion, where), source.completion, where)
        if source.completion
        else None
    )
    if source.completion_texts:
        text = Row(where, prompt, None, "", {}).text
        completion = source.completion_texts[
            int(share_of("completion " + text) * len(source.completion_texts))
        ]
    if isinstance(prompt, str):
        if examples and completion is None:
            asked = "completion (a column), completion_texts, or a conversation that ends with the assistant's answer"
            raise ConfigError(
                f"{where}: column {source.prompt!r} is a string, and fine-tuning needs its completion; give "
                f"{asked}"
            )
        if source.chat_template_kwargs and not source.chat and source.system is None:
            raise ConfigError(
                f"{where}: a string prompt meets no chat template, so chat_template_kwargs do nothing; set "
                "chat: true"
            )
    else:
        if examples and completion is None:
            prompt, completion = _parted(prompt, source.prompt, where)
        _refuse_ending(prompt, source.prompt, where)
    task = source.task or _label(
        _column(raw, source.task_column or "", where), source.task_column or "", where
    )
    return Row(where, prompt, completion, task, {k: v for k, v in raw.items() if k != source.prompt})


def _column(raw: Raw, column: str, where: Place) -> Any:
    """A column by name, or a value inside one by a dotted path (instances.0.output)."""
    if column in raw:
        return raw[column]
    value: Any = raw
    for key in column.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            names = (name if name.isprintable() else ascii(name) for name in raw)
            raise ConfigError(f"{where}: no column {column!r}; it has {', '.join(names)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _filled(template: list[tuple[str, str]], raw: Raw, where: Place) -> str:
    """The template with the row's columns; dotted paths inside braces work as elsewhere, and null is empty.

    A template that ends with a column has no blank end: where that column is empty, the row's text, and with
    it its side of the held-out split, is that of the template without it.
    """
    parts = []
    for text, column in template:
        value = _column(raw, column, where) if column else text
        if isinstance(value, dict | list | tuple | bytes):
            raise ConfigError(
                f"{where}: column {column!r} is {_shown(value)}; a template takes strings and numbers: name "
                "a part of it"
            )
        parts.append("" if value is None else str(value))
    filled = "".join(parts)
    return filled.rstrip() if template[-1][1] else filled


def _prompt(value: Any, column: str, where: Place) -> str | Conversation:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, LISTS) and value:
        return tuple([_message(message, column, where) for message in value])
    raise ConfigError(
        f"{where}: column {column!r} is {_shown(value)}; it must be a non-empty string or a list of chat "
        "messages"
    )


def _message(message: Any, column: str, where: Place) -> Message:
    """Role, content, and what else is a string (name, tool_call_id, reasoning_content), as templates read
    them."""
    if (
        not isinstance(message, dict)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content"), str)
    ):
        raise ConfigError(
            f"{where}: column {column!r}: the message {_shown(message)} needs role and content, both strings"
        )
    if message["role"] not in ROLES:
        raise ConfigError(
            f"{where}: column {column!r}: unknown role {message['role']!r}; use one of {', '.join(ROLES)}"
        )
    if len(message) == 2:
        return message
    if message.get("tool_calls") or message.get("function_call"):
        raise ConfigError(
            f"{where}: column {column!r}: a message calls tools, which would be lost; write the call into "
            "its content"
        )
    return {key: text for key, text in message.items() if isinstance(text, str)}


def _completion(value: Any, column: str, where: Place) -> str:
    """A string, or a conversation of one assistant message (TRL's form)."""
    if isinstance(value, LISTS) and value:
        messages = [_message(message, column, where) for message in value]
        if len(messages) > 1 or messages[0]["role"] != "assistant":
            roles = ", ".join(m["role"] for m in messages)
            raise ConfigError(
                f"{where}: column {column!r} has messages of {roles}; a completion is one message of the "
                "assistant"
            )
        value = messages[0]["content"]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(
            f"{where}: column {column!r} is {_shown(value)}; it must be a non-empty string, or one assistant "
            "message"
        )
    return value


def _parted(conversation: Conversation, column: str, where: Place) -> tuple[Conversation, str]:
    """What the last turn of the assistant answers, and that turn."""
    *before, last = conversation
    if last["role"] != "assistant" or not last["content"].strip() or not before:
        raise ConfigError(
            f"{where}: column {column!r}: the conversation must end with an answer of the assistant, which "
            "is what fine-tuning "
            f"learns; it has {len(conversation)} messages, the last by {last['role']}: add the answer, or "
            "name its column in completion"
        )
    return tuple(before), last["content"]


def _refuse_ending(conversation: Conversation, column: str, where: Place) -> None:
    if (role := conversation[-1]["role"]) not in ("user", "tool"):
        raise ConfigError(
            f"{where}: column {column!r}: the conversation ends with a message of {role}, and the model is "
            "asked for the next one; "
            "end it with a message of user or tool (a given beginning of the answer is not continued)"
        )
    if role == "user" and not conversation[-1]["content"].strip():
        raise ConfigError(
            f"{where}: column {column!r}: the last message, which the model answers, is empty; write it, or "
            "take the row out"
        )


def _label(value: Any, column: str, where: Place) -> str:
    if isinstance(value, bool | int | float) or (isinstance(value, str) and value.strip()):
        return str(value)
    raise ConfigError(
        f"{where}: column {column!r} is {_shown(value)}; task_column needs a label in every row"
    )


# ---- all of them


@dataclass(frozen=True)
class Overlap:
    """Held-out prompts that are training prompts too, compared by `normal`."""

    shared: int
    heldout: int
    """Different held-out prompts, as `normal` tells them apart."""

    def __str__(self) -> str:
        return f"{self.shared} of {self.heldout} held-out prompts are training prompts too (case, blanks and last mark aside)"


def identity(prompt: str | Conversation) -> str:
    """What two rows share when they are the same prompt to a model: `normal` text of all turns but the
    system's."""
    if isinstance(prompt, str):
        return normal(prompt)
    return "\n".join([normal(m["content"]) for m in prompt if m["role"] not in ("system", "developer")])


def overlap(train: Iterable[str], heldout: Iterable[str]) -> Overlap:
    """Of identities. Raises ConfigError where more than MAX_OVERLAP of the held-out prompts are trained
    on."""
    trained, measured = set(map(hash, train)), set(map(hash, heldout))
    found = Overlap(len(trained & measured), len(measured))
    if found.shared > MAX_OVERLAP * found.heldout:
        raise ConfigError(
            f"data.heldout: {found}, more than the {MAX_OVERLAP:.0%} that are let pass; give other prompts, "
            "or split one file with heldout_share and part"
        )
    return found


@dataclass(frozen=True)
class Checked:
    """What reading all rows once has found."""

    rows: int
    notes: tuple[str, ...]
    """What is let pass, and should be known."""


class Reading:
    """Reads data sets row by row, counting and noting. `progress` is told the count of rows, every
    thousand."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.progress = progress
        self.count, self.notes = 0, list[str]()

    def rows(self, sources: Sequence[DatasetConfig], examples: bool = False) -> Iterator[Row]:
        """Raises ConfigError at the first row that is wrong, or when a source is empty."""
        for source in sources:
            before, noted = self.count, examples
            for row in read_rows(source, examples):
                self.count += 1
                if not noted and not TAKEN.isdisjoint(row.columns):
                    names = ", ".join(sorted(TAKEN & set(row.columns)))
                    self.notes.append(
                        f"{row.where}: reward functions do not get the column {names}, but what frpo calls "
                        "so; rename it"
                    )
                    noted = True
                if self.count % 1000 == 0:
                    self.progress(self.count)
                yield row
            if self.count == before:
                raise ConfigError(
                    f"data set {source.path}: no row left after where, part and limit, or none in the file; "
                    "check them"
                )


def check(
    train: Sequence[DatasetConfig],
    heldout: Sequence[DatasetConfig] = (),
    prompts: Sequence[DatasetConfig] = (),
    examples: Sequence[DatasetConfig] = (),
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> Checked:
    """Read every row once: training and held-out prompts, other prompts, examples to fine-tune on. Raises
    ConfigError at the first row that is wrong, when a source is empty, and when too many held-out prompts are
    trained on."""
    reading = Reading(progress)
    trained, measured = (
        (identity(row.prompt) for row in reading.rows(sources)) for sources in (train, heldout)
    )
    shared = overlap(trained, measured)
    for _ in chain(reading.rows(prompts), reading.rows(examples, examples=True)):
        pass
    notes = [*reading.notes, *([str(shared)] if shared.shared else [])]
    return Checked(reading.count, tuple(notes))
