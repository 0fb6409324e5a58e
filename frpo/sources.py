"""Raw rows -> checked rows: prompt, completion, task and columns, and the held-out split.

Imports no ML library. Every error names the row by file and line.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from frpo.config import ConfigError, DatasetConfig
from frpo.config.data import split_template
from frpo.files import Place, Raw, raw_rows

HASH_RANGE = 1 << 32
ROLES = ("system", "developer", "user", "assistant", "tool")
TAKEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Names by which reward functions get something else than a column: such columns are noted, and kept from
them."""
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
        for message in reversed(self.prompt):
            if message["role"] == "user":
                return message["content"]
        return self.prompt[-1]["content"]


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: decides the held-out split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / HASH_RANGE


def normalize_text(text: str) -> str:
    """The text without what makes no other prompt of it: case, blanks, Unicode form (NFKC), a last mark
    (. ? !).

    Example: "How  are you?" and "how are you" are both "how are you".
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.lower()
    if "  " in text or not text.isprintable():  # of all blanks, the space alone is printable
        text = " ".join(text.split())
    return text.lstrip().rstrip(" .?!")


def read_dataset(source: DatasetConfig, examples: bool = False) -> Iterator[Row]:
    """The rows that `where`, the held-out split and `limit` leave; `examples` are fine-tuned on, so that each
    has a completion.

    The side of the split is a hash of the prompt as it is written; one that is `normal`-equal to an earlier
    prompt of the file follows that one. Raises ConfigError naming file, line and column.
    """
    template = split_template(source.prompt) if {"{", "}"} & set(source.prompt) else None
    sides: dict[str, bool] = {}
    kept = 0
    for where, raw in raw_rows(source):
        if any(str(_column_of(raw, name, where)) != value for name, value in source.where.items()):
            continue
        row = _make_row(source, template, raw, where, examples)
        if source.part != "all":
            heldout = sides.setdefault(normalize_text(row.text), share_of(row.text) < source.heldout_share)
            if heldout != (source.part == "heldout"):
                continue
        yield row
        kept += 1
        if kept == source.limit:
            return


# ---- one row


def _make_row(
    source: DatasetConfig, template: list[tuple[str, str]] | None, raw: Raw, where: Place, examples: bool
) -> Row:
    value = _fill_template(template, raw, where) if template else _column_of(raw, source.prompt, where)
    prompt = _check_prompt(value, source.prompt, where)
    completion = _completion_of(source, raw, prompt, where)
    if isinstance(prompt, str):
        if examples and completion is None:
            raise ConfigError(
                f"{where}: column {source.prompt!r} is a string, and fine-tuning needs its completion; give "
                "completion (a column), completion_texts, or a conversation that ends with the assistant's "
                "answer"
            )
        if source.chat_template_kwargs and not source.chat and source.system is None:
            raise ConfigError(
                f"{where}: a string prompt meets no chat template, so chat_template_kwargs do nothing; set "
                "chat: true"
            )
    else:
        if examples and completion is None:
            prompt, completion = _split_answer(prompt, source.prompt, where)
        _refuse_ending(prompt, source.prompt, where)
    columns = {name: value for name, value in raw.items() if name != source.prompt}
    return Row(where, prompt, completion, _task_of(source, raw, where), columns)


def _completion_of(source: DatasetConfig, raw: Raw, prompt: str | Conversation, where: Place) -> str | None:
    """The column, or the one of completion_texts that a hash of the prompt chooses."""
    completion = None
    if source.completion:
        completion = _check_completion(_column_of(raw, source.completion, where), source.completion, where)
    if source.completion_texts:
        text = Row(where, prompt, None, "", {}).text
        choice = int(share_of("completion " + text) * len(source.completion_texts))
        completion = source.completion_texts[choice]
    return completion


def _task_of(source: DatasetConfig, raw: Raw, where: Place) -> str:
    if source.task:
        return source.task
    column = source.task_column or ""
    return _check_label(_column_of(raw, column, where), column, where)


def _column_of(raw: Raw, column: str, where: Place) -> Any:
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


def _show_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _fill_template(template: list[tuple[str, str]], raw: Raw, where: Place) -> str:
    """The template with the row's columns; dotted paths inside braces work as elsewhere, and null is empty.

    A template that ends with a column has no blank end: where that column is empty, the row's text, and with
    it its side of the held-out split, is that of the template without it.
    """
    parts = []
    for text, column in template:
        value = _column_of(raw, column, where) if column else text
        if isinstance(value, dict | list | tuple | bytes):
            raise ConfigError(
                f"{where}: column {column!r} is {_show_value(value)}; a template takes strings and numbers: "
                "name a part of it"
            )
        parts.append("" if value is None else str(value))
    filled = "".join(parts)
    return filled.rstrip() if template[-1][1] else filled


def _check_prompt(value: Any, column: str, where: Place) -> str | Conversation:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, LISTS) and value:
        return tuple([_check_message(message, column, where) for message in value])
    raise ConfigError(
        f"{where}: column {column!r} is {_show_value(value)}; it must be a non-empty string or a list of "
        "chat messages"
    )


def _check_message(message: Any, column: str, where: Place) -> Message:
    """Role, content, and what else is a string (name, tool_call_id, reasoning_content), as templates read
    them."""
    if not _has_role_and_content(message):
        raise ConfigError(
            f"{where}: column {column!r}: the message {_show_value(message)} needs role and content, both "
            "strings"
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


def _has_role_and_content(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _check_completion(value: Any, column: str, where: Place) -> str:
    """A string, or a conversation of one assistant message (TRL's form)."""
    if isinstance(value, LISTS) and value:
        messages = [_check_message(message, column, where) for message in value]
        if len(messages) > 1 or messages[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"{where}: column {column!r} has messages of {roles}; a completion is one message of the "
                "assistant"
            )
        value = messages[0]["content"]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(
            f"{where}: column {column!r} is {_show_value(value)}; it must be a non-empty string, or one "
            "assistant message"
        )
    return value


def _split_answer(conversation: Conversation, column: str, where: Place) -> tuple[Conversation, str]:
    """What the last turn of the assistant answers, and that turn."""
    *before, last = conversation
    if last["role"] != "assistant" or not last["content"].strip() or not before:
        raise ConfigError(
            f"{where}: column {column!r}: the conversation must end with an answer of the assistant, which "
            f"is what fine-tuning learns; it has {len(conversation)} messages, the last by {last['role']}: "
            "add the answer, or name its column in completion"
        )
    return tuple(before), last["content"]


def _refuse_ending(conversation: Conversation, column: str, where: Place) -> None:
    role = conversation[-1]["role"]
    if role not in ("user", "tool"):
        raise ConfigError(
            f"{where}: column {column!r}: the conversation ends with a message of {role}, and the model is "
            "asked for the next one; end it with a message of user or tool (a given beginning of "
            "the answer is not continued)"
        )
    if role == "user" and not conversation[-1]["content"].strip():
        raise ConfigError(
            f"{where}: column {column!r}: the last message, which the model answers, is empty; write it, or "
            "take the row out"
        )


def _check_label(value: Any, column: str, where: Place) -> str:
    if isinstance(value, bool | int | float) or (isinstance(value, str) and value.strip()):
        return str(value)
    raise ConfigError(
        f"{where}: column {column!r} is {_show_value(value)}; task_column needs a label in every row"
    )
