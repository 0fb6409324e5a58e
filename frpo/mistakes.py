"""What pydantic finds wrong with a recipe, a line for each mistake: the field as the recipe has it, what is
wrong, value, remedy."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

MOST_LINES = 10
LONGEST_VALUE = 60
MOST_NAMES = 5
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
    errors: dict[Path, list[Any]] = {}
    for one in error.errors(include_url=False):
        path, _ = locate_field(kind, one["loc"])
        errors.setdefault(path, []).append(one)
    paths = [path for path in errors if not (_is_above(path, errors) or _is_inherited(path, errors))]
    lines = [mask_passwords(_line_of(path, errors[path], kind)) for path in paths]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"... and {len(lines) - MOST_LINES} more"]
    return "\n".join(lines)


def _is_above(path: Path, errors: Mapping[Path, list[Any]]) -> bool:
    """Whether something below it is wrong too."""
    depth = len(path)
    return any(len(other) > depth and other[:depth] == path for other in errors)


def _is_inherited(path: Path, errors: Mapping[Path, list[Any]]) -> bool:
    """Whether the same is wrong, or missing, in the run's own section."""
    if len(path) < 3 or path[0] not in INHERITING:
        return False
    runs_own = path[2:]  # arms, 0, learner, num_steps -> learner, num_steps
    error = errors[path][0]
    if error["type"] == "missing" and any(runs_own[:end] in errors for end in range(1, len(runs_own))):
        return True
    same = (error["type"], error["msg"])
    return any((other["type"], other["msg"]) == same for other in errors.get(runs_own, ()))


def locate_field(kind: type[BaseModel], where: Sequence[int | str]) -> tuple[Path, list[Any]]:
    """The path that the recipe has, without the members of unions that pydantic names in its own; and the
    types that fit there."""
    path: list[int | str] = []
    options: list[Any] = [kind]
    for part in where:
        if part == "[key]":  # pydantic's mark of a name that is wrong itself
            continue
        if len(options) > 1:
            options = [option for option in options if part in (*kinds_of(option), _name_of_type(option))]
            options = options or [Any]
        else:
            path.append(part)
            options = list(_members_of(_type_below(options[0], part)))
    return tuple(path), options


def _members_of(annotation: Any) -> Iterator[Any]:
    """The members of a union, None left out; what is none is its own."""
    if get_origin(annotation) is Annotated:
        yield from _members_of(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members_of(member)
    elif annotation is not NoneType:
        yield annotation


def _name_of_type(annotation: Any) -> str:
    return getattr(annotation, "__name__", "")


def _type_below(annotation: Any, part: int | str) -> Any:
    """The type of a field, of a list's items, or of what names stand for."""
    if part in fields_of(annotation):
        return annotation.model_fields[part].annotation
    inner = get_args(annotation)
    if not inner:
        return Any
    return inner[0] if isinstance(part, int) else inner[-1]


def fields_of(annotation: Any) -> list[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    return []


def kinds_of(annotation: Any) -> tuple[str, ...]:
    """What `kind` may be in a section that is told apart by it."""
    if "kind" not in fields_of(annotation):
        return ()
    return get_args(annotation.model_fields["kind"].annotation)


def _line_of(path: Path, errors: Sequence[Any], kind: type[BaseModel]) -> str:
    """What is wrong at one place; pydantic may say several things of it, one for each type that would fit."""
    first = errors[0]
    type_, given = first["type"], first["input"]
    field = ".".join(map(_name_of, path))
    last = str(path[-1]) if path else ""
    value = f"(value {shorten_value(given, last)})"
    _, options = locate_field(kind, first["loc"])
    if type_ == "missing":
        return f"{field}: missing; it has no default"
    if type_ == "extra_forbidden":
        _, sections = locate_field(kind, first["loc"][:-1])
        return f"{field}: unknown field {value}; {_suggest_field(last, sections)}"
    if type_ in ("union_tag_invalid", "union_tag_not_found"):
        return f"{field}.kind: {_wrong_kind(given, options)}"
    messages = [PLAIN.get(error["type"], error["msg"]).removeprefix("Value error, ") for error in errors]
    others = [message.removeprefix("Input should be ") for message in messages[1:]]
    message = " or ".join([messages[0], *others])
    if type_ == "value_error" and isinstance(given, dict):
        return _of_section(field, message, options)
    quotes = ""
    if type_ == "string_type" and isinstance(given, bool | int | float):
        quotes = "; put it in quotes"
    return f"{field or 'recipe'}: {message} {value}{quotes}"


def _suggest_field(name: str, sections: Sequence[Any]) -> str:
    near = difflib.get_close_matches(name, _fields_of_all(sections), 1)
    return f"did you mean {near[0]}?" if near else "`frpo config` lists the fields"


def _wrong_kind(given: Any, options: Sequence[Any]) -> str:
    kind = given.get("kind") if isinstance(given, dict) else None
    wrong = "missing" if kind is None else f"{shorten_value(kind)} is unknown"
    *choices, last = itertools.chain.from_iterable(map(kinds_of, options))
    return f"{wrong}; choose {', '.join(choices)} or {last}"


def _of_section(field: str, message: str, options: Sequence[Any]) -> str:
    """A message of a whole section, which may begin with the name of one of its fields."""
    if not field:
        return message
    joint = "." if message.partition(":")[0] in _fields_of_all(options) else ": "
    return f"{field}{joint}{message}"


def _fields_of_all(sections: Sequence[Any]) -> list[str]:
    return list(itertools.chain.from_iterable(map(fields_of, sections)))


def _name_of(part: int | str) -> str:
    return str(part) if re.fullmatch(r"[\w-]+", str(part)) else shorten_value(part)


def shorten_value(value: Any, field: str = "") -> str:
    """A value in a message: no more than a few words of it, and nothing of a secret."""
    if SECRET.search(field):
        return "not shown"
    if isinstance(value, dict):
        return _shorten_mapping(value)
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = mask_passwords(repr(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _shorten_mapping(fields: dict[Any, Any]) -> str:
    if not fields:
        return "no fields"
    names = [_name_of(name) for name in list(fields)[:MOST_NAMES]]
    if len(fields) > MOST_NAMES:
        names.append("...")
    return f"fields {', '.join(names)}"


def mask_passwords(text: str) -> str:
    """Without the user and password of an address."""
    return re.sub(r"//[^/@\s]*@", "//...@", text)
