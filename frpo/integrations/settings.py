"""What a user of another trainer says about FRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from frpo.objective import Frpo, Groups, Scale, lam_of_radius


@dataclass(frozen=True)
class FrpoSettings:
    """Exactly one of lam and rho. Raises ValueError otherwise."""

    lam: float | None = None
    """Temperature in reward units: small looks at the worst completion, large is Dr. GRPO."""
    rho: float | None = None
    """Radius in nats: each batch finds its own lam."""
    jackknife: bool = True
    """Correct the bias of the group's tilted policy (paper 4.3)."""
    scale: Scale = "code"
    """Of the advantages: code = max(lam, 1), exact = lam, unit = 1."""

    def __post_init__(self) -> None:
        if (self.lam is None) == (self.rho is None):
            raise ValueError(
                f"frpo: give exactly one of lam and rho, found lam {self.lam} and rho {self.rho}"
            )
        for name, value in (("lam", self.lam), ("rho", self.rho)):
            if value is not None and not value > 0:
                raise ValueError(f"frpo.{name}: {value} is not above 0")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> FrpoSettings:
        """From names and values. Raises ValueError for a name that is no setting."""
        settings = dict(given or {})
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"frpo.{unknown[0]}: unknown setting; choose from {', '.join(sorted(known))}")
        return cls(**settings)

    def advantages(self, rewards: Tensor) -> Tensor:
        """rewards `[groups, k]`, NaN where there is none -> advantages of the same shape and dtype, 0
        there."""
        groups = Groups.of(rewards, torch.isfinite(rewards))
        if self.rho is not None:
            lam = lam_of_radius(groups, self.rho)
        else:
            assert self.lam is not None
            lam = self.lam
        return Frpo(lam, self.jackknife, self.scale).advantages(groups).to(rewards.dtype)
