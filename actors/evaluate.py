"""Evaluation actors: log-probs of drawn completions under any saved policy, for KL(Q || reference) and KL(Q || policy)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors import _calls
from actors._scoring import FrozenPolicies, warm_up
from frpo.config import ModelConfig
from frpo.types import Floats, Group


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

    def logprobs(self, policy: str, groups: list[Group]) -> list[tuple[Floats, ...]]:
        """Per group, k arrays [T], nats, at temperature 1."""
        return self.policies.logprobs(policy, groups, 1.0)


class EvaluatePool:
    """All evaluation actors; implements evaluation.Scorer."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("evaluation", handles, timeout_s=timeout_s, restarts=restarts)

    def submit(self, policy: Path, groups: Sequence[Group]) -> Shares:
        """Contiguous shares, one per worker."""
        n = len(self.actors)
        cuts = [len(groups) * i // n for i in range(n + 1)]
        return Shares(
            [
                self.actors.call(i, "logprobs", str(policy), ray.put(list(groups[cuts[i] : cuts[i + 1]])))
                for i in range(n)
                if cuts[i] < cuts[i + 1]
            ]
        )

    def offload(self) -> None:
        self.actors.call_all("offload")

    def reload(self) -> None:
        self.actors.call_all("reload")


class Shares:
    """The answers of several workers, put together in order."""

    def __init__(self, calls: list[_calls.Call[list[tuple[Floats, ...]]]]) -> None:
        self.calls = calls

    def ready(self) -> bool:
        return all(call.ready() for call in self.calls)

    def result(self) -> list[tuple[Floats, ...]]:
        return [row for call in self.calls for row in call.result()]
