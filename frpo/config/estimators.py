"""The advantage estimators that a recipe can choose from, a section each with its own fields.

What each computes stands in `frpo.objective`, what it is called in `frpo.estimators`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Tag, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from frpo.config.section import PositiveFloat, Section


def refuse_fields(section: type[Section], fields: dict[str, Any], reasons: dict[str, str]) -> None:
    """Raises pydantic's ValidationError with a reason at each of some fields of a section."""
    details: list[InitErrorDetails] = [
        {
            "type": PydanticCustomError("refused", "{reason}", {"reason": reason}),
            "loc": (name,),
            "input": fields[name],
        }
        for name, reason in reasons.items()
    ]
    if details:
        raise ValidationError.from_exception_data(section.__name__, details)


class EstimatorSection(Section):
    """What the loop asks of any estimator; each has a field `kind` besides."""

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, data: Any) -> Any:
        if isinstance(data, dict):
            kind = cls.model_fields["kind"].default
            reasons: dict[str, str] = {}
            for other in ESTIMATORS:
                for name in data.keys() & other.model_fields.keys() - cls.model_fields.keys():
                    whose = other.model_fields["kind"].default
                    reasons[name] = f"it is a field of {whose}, and the kind here is {kind}"
            refuse_fields(cls, data, reasons)
        return data

    @property
    def temperature(self) -> float | None:
        """The given temperature of a robust objective, reward units; None: it has none, or a radius."""
        return None

    @property
    def radius(self) -> float | None:
        """The given radius in nats, from which each batch gets its temperature."""
        return None


class FrpoEstimator(EstimatorSection):
    kind: Literal["frpo"] = "frpo"
    """The robust objective: the worst policy inside a KL ball."""
    lam: PositiveFloat = 2.0
    """Temperature of the robust objective, reward units; large is GRPO, small looks at the worst
    completion."""
    rho: PositiveFloat | None = None
    """Radius in nats instead of lam: one lam per batch by line search on its rewards, smoothed over steps
    (radius mode)."""
    jackknife: bool = True
    """Remove the leading bias of the group estimate (equation 4.3)."""
    scale: Literal["exact", "unit", "code"] = "code"
    """Factor of the advantage: lam, 1, or max(lam, 1) as in the released code."""

    @property
    def temperature(self) -> float | None:
        return self.lam if self.rho is None else None

    @property
    def radius(self) -> float | None:
        return self.rho


class GrpoEstimator(EstimatorSection):
    kind: Literal["grpo"] = "grpo"
    """The reward less the mean of the group."""
    normalize_std: bool = False
    """Divide by the group's standard deviation."""


class RlooEstimator(EstimatorSection):
    kind: Literal["rloo"] = "rloo"
    """The reward less the mean of the others of the group."""


def kind_of(estimator: Any) -> str:
    """Of a section, or of one as a recipe has it."""
    if isinstance(estimator, dict):
        return str(estimator.get("kind", "frpo"))
    return str(getattr(estimator, "kind", "frpo"))


EstimatorConfig = Annotated[
    Annotated[FrpoEstimator, Tag("frpo")]
    | Annotated[GrpoEstimator, Tag("grpo")]
    | Annotated[RlooEstimator, Tag("rloo")],
    Discriminator(kind_of),
]
ESTIMATORS: tuple[type[EstimatorSection], ...] = tuple(
    get_args(member)[0] for member in get_args(get_args(EstimatorConfig)[0])
)
"""Every section."""


def merged_objective(default: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The fields of an objective with another's on top. An estimator of another kind takes nothing of the one
    below it; of the same kind, or of none, it takes the fields that it does not give itself."""
    estimator, chosen = default.get("estimator"), own.get("estimator")
    fields = {**default, **own}
    if chosen is None:
        chosen = {}
    if isinstance(estimator, dict) and isinstance(chosen, dict):
        same = "kind" not in chosen or kind_of(chosen) == kind_of(estimator)
        fields["estimator"] = {**estimator, **chosen} if same else chosen
    return fields
