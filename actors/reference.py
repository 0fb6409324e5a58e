"""The reference scorer: log-probs of each group under the frozen policy, as soon as the group is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
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

    def offload(self) -> None:
        """Leave the GPU to another role."""
        self.policies.offload()

    def reload(self) -> None:
        self.policies.reload()

    def logprobs(self, policy: str, group: Group, temperature: float) -> tuple[Floats, ...]:
        """k arrays [T], nats. A group is one call, so the numbers do not depend on what else waits."""
        return self.policies.logprobs(policy, [group], temperature)[0]


class ReferencePool:
    """All reference workers; implements roles.Reference.

    With `takes_turns` they share GPUs with the engines: what they are asked waits until the first answer is wanted, when all is drawn.
    """

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("reference", handles, timeout_s=timeout_s, restarts=restarts)
        self.policy, self.takes_turns = "", False
        self.waiting: list[Later] = []

    def use(self, policy: Path) -> None:
        """The policy to score by from now on."""
        self.policy = str(policy)

    def logprobs(self, group: Group, temperature: float) -> Pending[tuple[Floats, ...]]:
        ask = partial(self.actors.call, group.index % len(self.actors), "logprobs", self.policy, group, temperature)
        if not self.takes_turns:
            return ask()
        self.waiting.append(Later(ask, self.ask_all))
        return self.waiting[-1]

    def ask_all(self) -> None:
        for later in self.waiting:
            later.call = later.ask()
        self.waiting = []

    def offload(self) -> None:
        self.actors.call_all("offload")

    def reload(self) -> None:
        self.actors.call_all("reload")


class Later:
    """An answer that is asked for, with all others that wait, when the first of them is wanted."""

    def __init__(self, ask: Callable[[], Pending[tuple[Floats, ...]]], ask_all: Callable[[], None]) -> None:
        self.ask, self.ask_all = ask, ask_all
        self.call: Pending[tuple[Floats, ...]] | None = None

    def ready(self) -> bool:
        return self.call is not None and self.call.ready()

    def result(self) -> tuple[Floats, ...]:
        if self.call is None:
            self.ask_all()
        assert self.call is not None
        return self.call.result()
