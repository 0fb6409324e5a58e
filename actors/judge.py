"""Judges: engines of their own in the run's cluster (JudgeWorker), and what a reward worker holds of them
(JudgePool)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ray.actor import ActorHandle

from frpo.actors._calls import Actors, ProcessId, this_process
from frpo.config import JudgeReward
from frpo.rewards.template import JudgeTemplate
from frpo.secrets import NO_SECRETS, Secrets
from frpo.types import Item


class JudgeWorker:
    """One engine. An async actor: on GPUs its calls share the engine's steps."""

    def __init__(self, reward: JudgeReward, template: JudgeTemplate, secrets: Secrets = NO_SECRETS) -> None:
        from frpo.actors._judge import start_engine

        secrets.place()
        self.engine = start_engine(reward, template)

    async def ping(self) -> ProcessId:
        return this_process()

    async def score(self, items: Sequence[Item]) -> list[float | Exception]:
        """As `_judge.JudgeEngine.score`."""
        return await self.engine.score(items)


class JudgePool:
    """The engines of one judge, asked in turn. One that dies is waited for and asked again: its answers are
    the same."""

    def __init__(
        self, name: str, handles: Sequence[ActorHandle[JudgeWorker]], *, timeout_s: float, restarts: int
    ) -> None:
        self.actors: Actors[JudgeWorker] = Actors(name, handles, timeout_s=timeout_s, restarts=restarts)
        self.turns = itertools.count()

    def __call__(self, items: Sequence[Item]) -> list[float | Exception]:
        """One value per item, or the reason why there is none. Raises WorkerFailed."""
        index = next(self.turns) % len(self.actors)
        return self.actors.call_async(index, JudgeWorker.score, list(items)).result()
