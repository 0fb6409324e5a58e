"""What all parts of the configuration share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of what becomes a folder."""


class ConfigError(ValueError):
    """A mistake that the user can mend: the message names the field, the value and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
