"""What all parts of the configuration share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Redoes:
    """Marker of a field: the kinds of stage whose results it changes; what stands on them is done again too.

    `Annotated[Positive, NOTHING]`. A field without a marker has that of the section that holds it.
    """

    kinds: tuple[str, ...]


NOTHING = Redoes(())
"""Changes no number: places, resources, limits, names."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of what becomes a folder."""


class ConfigError(ValueError):
    """A mistake that the user can mend: the message names the field, the value and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
