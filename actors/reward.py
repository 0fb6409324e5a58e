"""Reward actors: the scoring class in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle

from actors import _calls
from frpo.config import RewardConfig
from frpo.roles import Pending
from frpo.scoring import Item, Scorer
from frpo.types import Group, Reward


class RewardWorker:
    """All rewards of the run."""

    def __init__(self, rewards: tuple[RewardConfig, ...]) -> None:
        self.scorer = Scorer(rewards)

    def ping(self) -> int:
        """Load the reward models, so that no call's time limit counts it."""
        self.scorer.load()
        return os.getpid()

    def score(self, group: Group) -> tuple[Reward, ...]:
        """k rewards, in the order of the completions."""
        prompt = group.prompt
        return tuple(self.scorer.score([Item(prompt.text, c.text, prompt.task, prompt.columns) for c in group.completions]))


class RewardPool:
    """All reward workers; implements roles.Rewards."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("reward", handles, timeout_s=timeout_s, restarts=restarts)

    def score(self, group: Group) -> Pending[tuple[Reward, ...]]:
        return self.actors.call(group.index % len(self.actors), "score", group)
