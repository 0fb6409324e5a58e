"""Evaluation actors: log-probs of drawn completions under any saved policy, for KL(Q || reference) and KL(Q
|| policy)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors import _calls
from actors._gather import Block, Dealt, Logprobs, deal
from actors._scoring import FrozenPolicies, warm_up
from frpo.batching import blocks_of
from frpo.config import ModelConfig
from frpo.shape import BUDGET_TOKENS
from frpo.types import Group


class EvaluateWorker:
    """Holds up to two policies: the reference, and the arm's policy before downstream."""

    def __init__(self, model: ModelConfig) -> None:
        self.policies = FrozenPolicies(model, capacity=2)

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


class EvaluatePool:
    """All evaluation actors; implements evaluation.Scorer."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("evaluation", handles, timeout_s=timeout_s, restarts=restarts)

    def submit(self, policy: Path, groups: Sequence[Group]) -> Dealt:
        return deal(self.actors, "logprobs", str(policy), 1.0, blocks=blocks_of(groups, BUDGET_TOKENS))

    def offload(self) -> None:
        self.actors.call_all("offload")

    def reload(self) -> None:
        self.actors.call_all("reload")
