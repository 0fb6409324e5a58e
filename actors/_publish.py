"""Publishers: bring the weights of whoever trains to every rollout engine, by one of two ways behind one interface."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from actors.rollout import RolloutPool
from frpo.roles import Pending
from frpo.types import WeightsMeta


class Source(Protocol):
    """A pool that trains: learners or fine-tune workers."""

    def put_weights(self) -> list[Any]: ...
    def weights_meta(self) -> WeightsMeta: ...
    def weight_address(self) -> tuple[str, int]: ...
    def open_weight_group(self, host: str, port: int, world_size: int, backend: str) -> Pending[None]: ...
    def broadcast_weights(self) -> Pending[None]: ...


class ObjectStorePublisher:
    """Rank 0 puts the weights once; every engine reads them from its node's store."""

    def __init__(self, name: str, source: Source, rollouts: RolloutPool) -> None:
        self.name, self.source, self.rollouts = name, source, rollouts

    def publish(self, policy_version: int) -> None:
        self.rollouts.forget()  # the last version's place in the store, before the next takes as much again
        self.rollouts.load_refs(self.source.put_weights(), policy_version)


class ProcessGroupPublisher:
    """Rank 0 broadcasts to all engines over gloo or NCCL. The group is formed anew when an engine was restarted.

    An engine that is killed in the middle of a broadcast breaks it: the run ends and is resumed from its checkpoint.
    """

    def __init__(self, name: str, source: Source, rollouts: RolloutPool) -> None:
        self.name, self.source, self.rollouts = name, source, rollouts
        self.members: tuple[int, ...] = ()
        self.meta: WeightsMeta | None = None

    def publish(self, policy_version: int) -> None:
        self.rollouts.forget()  # a broadcast that an engine missed is not repeated to it alone
        members = self.rollouts.members()
        if members != self.members:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            host, port = self.source.weight_address()
            size = self.rollouts.num_ranks + 1
            opening = self.source.open_weight_group(host, port, size, backend)
            self.rollouts.join_group(self.name, host, port, size, backend)
            opening.result()
            self.members, self.meta = members, self.source.weights_meta()
        assert self.meta is not None
        sending = self.source.broadcast_weights()
        self.rollouts.receive(self.name, self.meta, policy_version)
        sending.result()
        self.rollouts.actors.when_back = lambda: self.publish(policy_version)
