"""What is adjusted from one step to the next: lam towards a radius, beta towards a KL to the reference. Pure functions.

Both follow slowly what single, noisy batches say; so a batch misses its radius, and a run its KL, by what they log.
"""

from __future__ import annotations

import math

import torch

from frpo.config import ObjectiveConfig
from frpo.objective import lam_of_radius
from frpo.types import Steering

LAM_FLOOR = 0.02
"""Reward units: lam goes no lower where a batch cannot reach rho."""
SMOOTHING = 0.2
"""Weight of the newest batch in log lam."""
GAIN = 0.3
"""Change of log beta in one step when the KL is off by its whole target."""
RAMP = 0.5
"""Share of the steps over which the KL aimed at rises to its target."""


def begin(objective: ObjectiveConfig) -> Steering:
    return Steering(beta=objective.beta, lam=None)


def lam_for(rewards: torch.Tensor, mask: torch.Tensor, objective: ObjectiveConfig, state: Steering) -> float:
    """The temperature of this batch: the given one, or in radius mode the batch's own, smoothed with those before."""
    if objective.rho is None:
        return objective.lam
    own = lam_of_radius(rewards, objective.rho, floor=LAM_FLOOR, mask=mask)
    if state.lam is None:
        return own
    return math.exp((1 - SMOOTHING) * math.log(state.lam) + SMOOTHING * math.log(own))


def after(state: Steering, objective: ObjectiveConfig, *, lam: float | None, kl: float | None, done: float) -> Steering:
    """State of the next step. `kl` is what this step's batch measured, `done` the share of the steps behind it."""
    beta = state.beta
    if objective.target_kl is not None and kl is not None:
        aim = objective.target_kl * min(1.0, done / RAMP)
        beta *= math.exp(GAIN * min(1.0, max(-1.0, (kl - aim) / objective.target_kl)))
    return Steering(beta=beta, lam=lam if objective.rho is not None else None)
