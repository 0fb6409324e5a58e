"""The reference scorer: log-probs of each group under the frozen policy, as soon as the group is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors import _calls
from actors._scoring import FrozenPolicies, warm_up
from frpo.config import ModelConfig
from frpo.roles import Pending
from frpo.types import Floats, Group


class ReferenceWorker:
    """One copy of the reference. The policy's folder comes with each call, so that a restarted worker needs no set-up."""

    def __init__(self, model: ModelConfig) -> None:
        self.policies = FrozenPolicies(model, capacity=1)

    def ping(self) -> int:
        warm_up()
        return os.getpid()

    def logprobs(self, policy: str, group: Group, temperature: float) -> tuple[Floats, ...]:
        """k arrays [T], nats. A group is one call, so the numbers do not depend on what else waits."""
        return self.policies.logprobs(policy, [group], temperature)[0]


class ReferencePool:
    """All reference workers; implements roles.Reference."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("reference", handles, timeout_s=timeout_s, restarts=restarts)
        self.policy = ""

    def use(self, policy: Path) -> None:
        """The policy to score by from now on."""
        self.policy = str(policy)

    def logprobs(self, group: Group, temperature: float) -> Pending[tuple[Floats, ...]]:
        return self.actors.call(group.index % len(self.actors), "logprobs", self.policy, group, temperature)
