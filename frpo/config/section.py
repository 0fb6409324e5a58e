"""What all parts of the configuration share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Redoes:
    """Marker of a field: the kinds of stage whose results it changes; what stands on them is done again too.

    `Annotated[Positive, NOTHING]`. A field without a marker has that of the section that holds it. What
    changes numbers by the rounding of another order of sums alone (how a batch is cut, sharded or offloaded)
    counts as nothing.
    """

    kinds: tuple[str, ...]
    one: bool = False
    """It counts for the one arm or fine-tune that holds it, or takes it as a default; not for all."""


NOTHING = Redoes(())
"""Changes no number: places, resources, limits, names."""

MOST_PATH = 4095
"""Bytes that Linux takes of a path."""
MOST_PART = 255
"""Bytes that it takes between two slashes."""


def _expand_path(path: str) -> str:
    """With ~ expanded. Raises ValueError for what no file system can hold."""
    if not path or "\0" in path:
        raise ValueError("this is no path; give one, or leave the field out")
    sizes = [len(os.fsencode(part)) for part in path.split("/")]
    if len(os.fsencode(path)) > MOST_PATH or max(sizes) > MOST_PART:
        raise ValueError(
            f"no path has more than {MOST_PATH} bytes, or {MOST_PART} between two slashes; give a shorter one"
        )
    return os.path.expanduser(path)  # pathlib raises for ~nobody


PathText = Annotated[str, AfterValidator(_expand_path)]
"""A path, or a name of something else; ~ is the home folder."""
Folder = Annotated[Path, BeforeValidator(lambda path: _expand_path(path) if isinstance(path, str) else path)]


@dataclass(frozen=True)
class Content:
    """Marker of a field that names what lies outside the recipe: it counts by what it holds, wherever it lies
    (`frpo.content` says how)."""

    of: Literal["model", "data", "code", "tasks", "template"]


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Of what becomes a folder."""


class ConfigError(ValueError):
    """A mistake that the user can mend: the message names the field, the value and the remedy."""


class Missing(ConfigError):
    """Nothing is wrong with the configuration, but this machine lacks what it needs."""


class Section(BaseModel):
    """NaN and infinity are no values of a field, and yes and no are no numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        """Python takes True for 1, and YAML takes yes for True."""
        given = data if isinstance(data, dict) else {}
        wrong = [
            name
            for name, field in cls.model_fields.items()
            if _holds_truth(given.get(name)) and _is_number(field.annotation)
        ]
        if wrong:
            details: list[InitErrorDetails] = [
                {"type": NO_NUMBER, "loc": (name,), "input": given[name]} for name in wrong
            ]
            raise ValidationError.from_exception_data(cls.__name__, details)
        return data


NO_NUMBER = PydanticCustomError("number_type", "Input should be a number, not yes or no")


def _holds_truth(value: Any) -> bool:
    """Whether a value is a truth value, or a list or mapping that holds one."""
    if isinstance(value, dict):
        return any(isinstance(item, bool) for item in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(item, bool) for item in value)
    return isinstance(value, bool)


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers, or lists or names of them, and no truth values."""
    kinds = _kinds_of(annotation)
    return bool({int, float} & kinds) and not {bool, Any} & kinds


def _kinds_of(annotation: Any) -> set[type]:
    """The plain types that an annotation is made of, those of literals too."""
    parts = get_args(annotation)
    if parts:
        return set().union(*map(_kinds_of, parts))
    return {annotation if isinstance(annotation, type) else type(annotation)}
