"""The reference scorer: log-probs of each group under the frozen policy, as soon as the group is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors import _calls
from actors._gather import Block, Dealt, Gathered, Logprobs, deal
from actors._scoring import FrozenPolicies, warm_up
from frpo.config import ModelConfig
from frpo.roles import Pending
from frpo.types import Group


class ReferenceWorker:
    """One copy of the reference. The policy's folder comes with each call, so that a restarted worker needs
    no set-up."""

    def __init__(self, model: ModelConfig) -> None:
        self.policies = FrozenPolicies(model, capacity=1)

    def ping(self) -> int:
        warm_up()
        return os.getpid()

    def offload(self) -> None:
        """Leave the GPU to another role."""
        self.policies.offload()

    def reload(self) -> None:
        self.policies.reload()

    def logprobs(self, policy: str, temperature: float, blocks: list[Block]) -> list[list[Logprobs]]:
        return [self.policies.logprobs(policy, block, temperature) for block in blocks]


class ReferencePool:
    """All reference workers; implements roles.Reference.

    With `takes_turns` they share GPUs with the engines: what they are asked waits until the first answer is
    wanted, when all is drawn.
    """

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("reference", handles, timeout_s=timeout_s, restarts=restarts)
        self.policy, self.temperature, self.takes_turns = "", 1.0, False
        self.gathered = Gathered(self._ask)

    def use(self, policy: Path, temperature: float) -> None:
        """The policy to score by from now on, and the rollouts' temperature."""
        self.policy, self.temperature = str(policy), temperature

    def score(self, group: Group) -> Pending[Logprobs]:
        later = self.gathered.later(group)
        if not self.takes_turns:
            self.gathered.ask_all()
        return later

    def _ask(self, groups: list[Group]) -> Dealt:
        """Each group is a block, so the numbers do not depend on what else waits."""
        blocks = [[g] for g in groups]
        return deal(
            self.actors, "logprobs", self.policy, self.temperature, blocks=blocks, first=groups[0].index
        )

    def offload(self) -> None:
        self.actors.call_all("offload")

    def reload(self) -> None:
        self.actors.call_all("reload")
