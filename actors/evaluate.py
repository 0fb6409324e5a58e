"""Evaluation actors: log-probs of drawn completions under any saved policy, for KL(Q || reference) and KL(Q
|| policy)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ray.actor import ActorHandle

from frpo.actors._frozen import FrozenPool, FrozenWorker
from frpo.actors._gather import Dealt
from frpo.batching import blocks_of
from frpo.shape import BUDGET_TOKENS
from frpo.types import Group


class EvaluateWorker(FrozenWorker):
    """Holds the reference, and the arm's policy before downstream."""

    CAPACITY = 2


class EvaluatePool(FrozenPool[EvaluateWorker]):
    """All evaluation actors; implements evaluation.Scorer."""

    def __init__(
        self, handles: Sequence[ActorHandle[EvaluateWorker]], *, timeout_s: float, restarts: int
    ) -> None:
        super().__init__("evaluation", handles, timeout_s=timeout_s, restarts=restarts)

    def submit(self, policy: Path, groups: Sequence[Group]) -> Dealt:
        return self.ask(blocks_of(groups, BUDGET_TOKENS), str(policy), 1.0)
