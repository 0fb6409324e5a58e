"""Publishers: bring the weights of whoever trains to every rollout engine, as parcels of one transport."""

from __future__ import annotations

from typing import Protocol

from actors.rollout import RolloutPool
from actors.transport import Parcel
from actors.transport.group import Announced
from frpo.roles import Pending


class Packs(Protocol):
    """A pool that trains: learners or fine-tune workers."""

    def pack(self) -> Pending[Parcel]: ...


class Broadcasts(Packs, Protocol):
    """One whose transport is a process group; its pack() ends when the engines have received."""

    def weight_address(self) -> tuple[str, int]: ...
    def open_weight_group(self, host: str, port: int, world_size: int, backend: str) -> Pending[None]: ...
    def announce(self, group: str) -> Announced: ...


class ParcelPublisher:
    """Rank 0 packs once; every engine takes the parcel in, and so does one that is restarted later."""

    def __init__(self, source: Packs, rollouts: RolloutPool) -> None:
        self.source, self.rollouts = source, rollouts

    def publish(self, policy_version: int) -> int:
        self.rollouts.forget()  # the last version's place in the store, before the next takes as much again
        parcel = self.source.pack().result()
        self.rollouts.deliver(parcel, policy_version)
        return parcel.num_bytes


class GroupPublisher:
    """Rank 0 broadcasts to all engines over gloo or NCCL. The group is formed anew when an engine was
    restarted.

    An engine that is killed in the middle of a broadcast breaks it: the run ends and is resumed from its
    checkpoint.
    """

    def __init__(self, name: str, source: Broadcasts, rollouts: RolloutPool, backend: str) -> None:
        self.name, self.source, self.rollouts, self.backend = name, source, rollouts, backend
        self.members: tuple[int, ...] = ()
        self.parcel: Announced | None = None

    def publish(self, policy_version: int) -> int:
        self.rollouts.forget()  # a broadcast that an engine missed is not repeated to it alone
        members = self.rollouts.members()
        if self.parcel is None or members != self.members:
            host, port = self.source.weight_address()
            size = self.rollouts.num_ranks + 1
            opening = self.source.open_weight_group(host, port, size, self.backend)
            self.rollouts.join_group(self.name, host, port, size, self.backend)
            opening.result()
            self.members, self.parcel = members, self.source.announce(self.name)
        sending = self.source.pack()
        self.rollouts.receive(self.parcel, policy_version)
        sending.result()
        self.rollouts.actors.when_back = lambda: self._again(policy_version)
        return self.parcel.num_bytes

    def _again(self, policy_version: int) -> None:
        self.publish(policy_version)
