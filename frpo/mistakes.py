"""What pydantic finds wrong with a recipe, a line for each mistake: the field as the recipe has it, what is
wrong, value, remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

MOST_LINES = 10
LONGEST_VALUE = 60
SECRET = re.compile(r"(^|_)(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
"""Names of fields whose values are not shown."""
INHERITING = ("arms", "downstream")
"""Their items have the run's own objective and learner under them."""
PLAIN = {
    "tuple_type": "Input should be a list",
    "model_type": "Input should be fields with values",
    "model_attributes_type": "Input should be fields with values",
    "dict_type": "Input should be names with values",
    "invalid_key": "A name should be a string; put it in quotes",
    "path_type": "Input should be a path; put it in quotes",
}
"""In words of YAML."""

Path = tuple[int | str, ...]


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """At most MOST_LINES lines. A list whose items are wrong is not wrong besides, nor what inherits a wrong
    value."""
    found: dict[Path, list[Any]] = {}
    for one in error.errors(include_url=False):
        found.setdefault(place(kind, one["loc"])[0], []).append(one)
    paths = [
        p
        for p in found
        if not any(len(q) > len(p) and q[: len(p)] == p for q in found) and not _inherited(p, found)
    ]
    lines = [masked(_line(p, found[p], kind)) for p in paths]
    more = [f"... and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join([*lines[:MOST_LINES], *more])


def _inherited(path: Path, found: dict[Path, list[Any]]) -> bool:
    """Whether the same is wrong, or missing, in the run's own section."""
    if len(path) < 3 or path[0] not in INHERITING:
        return False
    own, mine = path[2:], found[path][0]
    if mine["type"] == "missing" and any(own[:end] in found for end in range(1, len(own))):
        return True
    return any((e["type"], e["msg"]) == (mine["type"], mine["msg"]) for e in found.get(own, ()))


def place(kind: type[BaseModel], where: Sequence[int | str]) -> tuple[Path, list[Any]]:
    """The path that the recipe has, without the members of unions that pydantic names in its own; and the
    types that fit there."""
    path: list[int | str] = []
    options: list[Any] = [kind]
    for part in (p for p in where if p != "[key]"):  # pydantic's mark of a name that is wrong itself
        if len(options) > 1:
            options = [o for o in options if part in kinds_of(o)] or [Any]
        else:
            path.append(part)
            options = list(_options(_below(options[0], part)))
    return tuple(path), options


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, None left out; what is none is its own."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _options(member)
    elif annotation is not NoneType:
        yield annotation


def _below(annotation: Any, part: int | str) -> Any:
    """The type of a field, of a list's items, or of what names stand for."""
    if part in fields_of(annotation):
        return annotation.model_fields[part].annotation
    inner = get_args(annotation)
    if not inner:
        return Any
    return inner[0] if isinstance(part, int) else inner[-1]


def fields_of(annotation: Any) -> list[str]:
    return (
        list(annotation.model_fields)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
        else []
    )


def kinds_of(annotation: Any) -> tuple[str, ...]:
    """What `kind` may be in a section that is told apart by it."""
    return get_args(annotation.model_fields["kind"].annotation) if "kind" in fields_of(annotation) else ()


def _line(path: Path, errors: list[Any], kind: type[BaseModel]) -> str:
    first = errors[0]
    options = place(kind, first["loc"])[1]
    field = ".".join(map(_name, path))
    value = f"(value {short(first['input'], str(path[-1]) if path else '')})"
    if first["type"] == "missing":
        return f"{field}: missing; it has no default"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(path[-1]), [n for o in place(kind, first["loc"][:-1])[1] for n in fields_of(o)], 1
        )
        return f"{field}: unknown field {value}; {f'did you mean {near[0]}?' if near else '`frpo config` lists the fields'}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = first["input"].get("kind") if isinstance(first["input"], dict) else None
        choices = [k for o in options for k in kinds_of(o)]
        wrong = "missing" if given is None else f"{short(given)} is unknown"
        return f"{field}.kind: {wrong}; choose {', '.join(choices[:-1])} or {choices[-1]}"
    messages = [PLAIN.get(e["type"], e["msg"]).removeprefix("Value error, ") for e in errors]
    message = " or ".join([messages[0], *(m.removeprefix("Input should be ") for m in messages[1:])])
    if first["type"] == "value_error" and isinstance(
        first["input"], dict
    ):  # of a whole section: it begins with the field
        joint = "." if message.partition(":")[0] in [n for o in options for n in fields_of(o)] else ": "
        return f"{field}{joint}{message}" if field else message
    quotes = (
        "; put it in quotes"
        if first["type"] == "string_type" and isinstance(first["input"], bool | int | float)
        else ""
    )
    return f"{field or 'recipe'}: {message} {value}{quotes}"


def _name(part: int | str) -> str:
    return str(part) if re.fullmatch(r"[\w-]+", str(part)) else short(part)


def short(value: Any, field: str = "") -> str:
    """A value in a message: no more than a few words of it, and nothing of a secret."""
    if SECRET.search(field):
        return "not shown"
    if isinstance(value, dict):
        return (
            f"fields {', '.join(_name(k) for k in list(value)[:5])}{', ...' if len(value) > 5 else ''}"
            if value
            else "no fields"
        )
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = masked(repr(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def masked(text: str) -> str:
    """Without the user and password of an address."""
    return re.sub(r"//[^/@\s]*@", "//...@", text)
