"""Saved policies that nobody trains, held by transformers: what reference scorers and evaluation actors are.

Both kinds of actor are the same but for how many policies they hold at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from ray.actor import ActorHandle

from frpo.actors._blocks import Block, Logprobs, by_group, sequences_of
from frpo.actors._calls import Actors, ProcessId, RemoteCall, this_process
from frpo.actors._gather import BlockScores, Dealt, deal_out
from frpo.config import ModelConfig
from frpo.shape import BUDGET_TOKENS
from frpo.types import Group

if TYPE_CHECKING:
    from frpo.actors._host import Host
    from frpo.logprobs import LogprobModel


class FrozenPolicies:
    """Keeps the last `capacity` policies that were asked for."""

    def __init__(self, model: ModelConfig, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.loaded: dict[str, tuple[LogprobModel, Host]] = {}
        """By policy, the newest last; with the place of its weights while another role has the GPU."""

    def offload(self) -> None:
        """Leave the GPU to another role."""
        from frpo.actors._host import frozen_tensors

        for scorer, host in self.loaded.values():
            host.take(frozen_tensors(scorer))

    def reload(self) -> None:
        for _, host in self.loaded.values():
            host.give()

    def logprobs(self, policy: str, block: Sequence[Group], temperature: float) -> list[Logprobs]:
        """Per group of a block, k arrays [T]: log-probs of its completions, nats."""
        from frpo.actors._dist import own_device
        from frpo.logprobs import completion_logprobs

        flat = completion_logprobs(
            self._scorer_of(policy),
            sequences_of(block),
            temperature=temperature,
            budget_tokens=BUDGET_TOKENS,
            device=own_device(),
        )
        return by_group(flat, block)

    def _scorer_of(self, policy: str) -> LogprobModel:
        if policy in self.loaded:
            self.loaded[policy] = self.loaded.pop(policy)
        else:
            while len(self.loaded) >= self.capacity:
                del self.loaded[next(iter(self.loaded))]
            self.loaded[policy] = self._load(policy)
        return self.loaded[policy][0]

    def _load(self, policy: str) -> tuple[LogprobModel, Host]:
        from frpo import hub, policies
        from frpo.actors._dist import own_device, use_deterministic
        from frpo.actors._host import Host
        from frpo.logprobs import LogprobModel

        if self.model.deterministic:
            use_deterministic()
        model = policies.load_beside(
            hub.on_this_node(policy), dtype=self.model.dtype, attention=self.model.attention
        )
        scorer = LogprobModel(model.to(own_device())).eval().requires_grad_(False)
        return scorer, Host(own_device(), frozen=True)


class FrozenWorker:
    """One process with up to CAPACITY policies. A policy's folder comes with each call, so that a restarted
    worker needs no set-up."""

    CAPACITY: ClassVar[int]

    def __init__(self, model: ModelConfig) -> None:
        self.policies = FrozenPolicies(model, self.CAPACITY)

    def ping(self) -> ProcessId:
        """Do the long imports while other actors start."""
        import transformers  # noqa: F401

        import frpo.logprobs
        import frpo.policies  # noqa: F401

        return this_process()

    def offload(self) -> None:
        """Leave the GPU to another role."""
        self.policies.offload()

    def reload(self) -> None:
        self.policies.reload()

    def logprobs(self, policy: str, temperature: float, blocks: list[Block]) -> list[list[Logprobs]]:
        return [self.policies.logprobs(policy, block, temperature) for block in blocks]


W = TypeVar("W", bound=FrozenWorker)


class FrozenPool(Generic[W]):
    """All workers of one kind."""

    def __init__(
        self, role: str, handles: Sequence[ActorHandle[W]], *, timeout_s: float, restarts: int
    ) -> None:
        self.actors: Actors[W] = Actors(role, handles, timeout_s=timeout_s, restarts=restarts)

    def ask(self, blocks: Sequence[Block], policy: str, temperature: float, first: int = 0) -> Dealt:
        """Share blocks out over the workers, from worker `first` on."""

        def logprobs(worker: int, hand: list[Block]) -> RemoteCall[BlockScores]:
            return self.actors.call(worker, FrozenWorker.logprobs, policy, temperature, hand)

        return deal_out(blocks, len(self.actors), logprobs, first)

    def offload(self) -> None:
        self.actors.call_all(FrozenWorker.offload)

    def reload(self) -> None:
        self.actors.call_all(FrozenWorker.reload)
