"""Who pays the KL penalty, and how much: the weight of a task, and the gate that lets failures on protected
tasks go free. Pure functions.

A penalty pulls a policy back towards its reference, and with it the failures that training has removed. With
S the successes and F the failures of a prompt,

    KL(policy || ref) = KL(Bernoulli policy(S) || Bernoulli ref(S))
                        + policy(S) KL(policy given S || ref given S) + policy(F) KL(policy given F || ...)

and only the second part keeps good answers what they were. The gate keeps it and drops the two others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from frpo.config import GateConfig, ObjectiveConfig
from frpo.objective import Groups, reverse_penalty
from frpo.stats import GateStats
from frpo.types import Floats, ScoredGroup

Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]

CEILING = 20.0
"""Nats: a failure whose log-ratio is above it pays in spite of the gate. The policy then favours something
that the reference all but never says, and in a long completion that can be any text."""


@dataclass(frozen=True)
class Penalty:
    """Of the groups of a step."""

    objective: ObjectiveConfig
    scored: Sequence[ScoredGroup]
    rewards: Doubles
    """`[G, k]`, as they are trained on."""
    trains: Mask
    """`[G, k]`"""
    beta: float
    """Of the step, where a task has no factor."""

    @cached_property
    def divergence(self) -> Doubles | None:
        """D `[G, k]` of each completion, nats; None where nobody asked for its log-probs."""
        return log_ratios(self.scored)

    @cached_property
    def pays(self) -> Mask:
        """`[G, k]`: of those that train, all that no gate lets pass."""
        gate = self.objective.gate
        if gate is None or self.divergence is None:
            return self.trains
        open_to = self.protected(gate)[:, None] & (self.rewards < gate.threshold)
        pays: Mask = self.trains & ~(open_to & (self.divergence <= CEILING))
        return pays

    def protected(self, gate: GateConfig) -> Mask:
        """`[G]`"""
        return np.array([item.group.prompt.task in gate.tasks for item in self.scored])

    @property
    def betas(self) -> Doubles:
        """`[G, 1]`, reward units per nat."""
        factors = [self.objective.beta_of.get(item.group.prompt.task, 1.0) for item in self.scored]
        return self.beta * np.array(factors)[:, None]

    @property
    def per_token(self) -> Floats:
        """`[G, k]`: what a penalty in the loss weighs for each token of a completion."""
        return np.where(self.pays, self.betas, 0.0).astype(np.float32)

    @property
    def of_advantages(self) -> Doubles:
        """`[G, k]`: what the reverse penalty adds to each advantage; 0 where there is none."""
        if self.divergence is None or self.objective.penalty != "reverse" or self.beta == 0:
            return np.zeros(self.trains.shape)
        ratios = Groups.of(torch.from_numpy(self.divergence), torch.from_numpy(self.pays))
        added: Doubles = reverse_penalty(ratios, torch.from_numpy(self.betas)).numpy()
        return added

    def describe_gate(self) -> GateStats | None:
        """None without a gate, or a protected completion."""
        gate = self.objective.gate
        if gate is None or self.divergence is None:
            return None
        rows = np.flatnonzero(self.protected(gate) & self.trains.any(axis=1))
        parts = []
        for g in rows:
            drawn = self.trains[g]
            parts.append(split_kl(self.divergence[g][drawn], self.rewards[g][drawn] >= gate.threshold))
        return GateStats(*map(float, np.mean(parts, axis=0))) if parts else None


def log_ratios(scored: Sequence[ScoredGroup]) -> Doubles | None:
    """D `[G, k]` of each completion; None where the policy's log-probs or the reference's were not asked
    for."""
    rows = []
    for item in scored:
        if item.policy is None or item.reference is None:
            return None
        rows.append(log_ratios_of(item.policy, item.reference))
    return np.array(rows)


def log_ratios_of(policy: Sequence[Floats], reference: Sequence[Floats]) -> list[float]:
    """Of each completion: sum over its tokens of log policy - log reference, nats."""
    pairs = zip(policy, reference, strict=True)
    return [float((own.astype(np.float64) - other).sum()) for own, other in pairs]


def split_kl(log_ratio: Doubles, success: Mask) -> tuple[float, float, float, float]:
    """P(F) and the three parts of the KL of one prompt, in the order of `GateStats`, from draws of the
    policy; the parts add up to the mean log-ratio.

    log ref(S) / policy(S) is estimated by log mean over S of exp(-D), whose expectation is just that.
    """
    outcome = 0.0
    inside = []
    for side in (success, ~success):
        share = float(side.mean())
        if share == 0:
            inside.append(0.0)
            continue
        own = log_ratio[side]
        # log mean exp(-D), the largest taken out
        log_gain = float(np.log(np.exp(own.min() - own).mean()) - own.min())
        inside.append(share * (float(own.mean()) + log_gain))
        outcome -= share * log_gain
    return float((~success).mean()), outcome, inside[0], inside[1]
