"""The reference scorer: log-probs of each group under the frozen policy, as soon as the group is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ray.actor import ActorHandle

from frpo.actors._blocks import Logprobs
from frpo.actors._frozen import FrozenPool, FrozenWorker
from frpo.actors._gather import Dealt, Gathered
from frpo.roles import Pending
from frpo.types import Group


class ReferenceWorker(FrozenWorker):
    """Holds the reference."""

    CAPACITY = 1


class ReferencePool(FrozenPool[ReferenceWorker]):
    """All reference workers; implements roles.Reference.

    With `takes_turns` they share GPUs with the engines: what they are asked waits until the first answer is
    wanted, when all is drawn.
    """

    def __init__(
        self, handles: Sequence[ActorHandle[ReferenceWorker]], *, timeout_s: float, restarts: int
    ) -> None:
        super().__init__("reference", handles, timeout_s=timeout_s, restarts=restarts)
        self.takes_turns = False
        self.policy = ""
        self.temperature = 1.0
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
        return self.ask([[group] for group in groups], self.policy, self.temperature, groups[0].index)
