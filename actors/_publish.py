"""Publishers: bring the weights of whoever trains to every rollout engine, as parcels of one transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from frpo.actors._calls import LostWithOwner, ProcessId, logger
from frpo.actors._train import TrainPool, TrainWorker
from frpo.actors.rollout import EngineLost, RolloutPool
from frpo.actors.transport.group import Announced


class ParcelPublisher:
    """Rank 0 packs once; every engine takes the parcel in, and so does one that is restarted later."""

    def __init__(self, source: TrainPool[Any], rollouts: RolloutPool) -> None:
        self.source, self.rollouts = source, rollouts

    def publish(self, policy_version: int) -> int:
        self.rollouts.forget()  # the last version's place in the store, before the next takes as much again
        parcel = self.source.pack().result()
        with self._owner_named():
            self.rollouts.deliver(parcel, policy_version)
        restore = self.rollouts.actors.when_back

        def restore_or_name(worker: int) -> None:
            with self._owner_named():
                restore(worker)

        self.rollouts.actors.when_back = restore_or_name
        return parcel.num_bytes

    @contextmanager
    def _owner_named(self) -> Iterator[None]:
        """A parcel dies with the rank that packed it: then the job begins anew, and publishes again."""
        try:
            yield
        except LostWithOwner as error:
            raise self.source.actors.died(str(error)) from None


class GroupPublisher:
    """Rank 0 broadcasts to all engines over gloo or NCCL. The group is formed anew when an engine or a rank
    was restarted. An engine that is killed in the middle of a broadcast breaks it: it is made again, once the
    engine is back.
    """

    def __init__(self, name: str, source: TrainPool[Any], rollouts: RolloutPool, backend: str) -> None:
        self.name, self.source, self.rollouts, self.backend = name, source, rollouts, backend
        self.members: tuple[ProcessId, ...] = ()
        self.parcel: Announced | None = None

    def publish(self, policy_version: int) -> int:
        self.rollouts.forget()  # a broadcast that an engine missed is not repeated to it alone
        for _ in range(self.rollouts.restarts):
            try:
                return self._broadcast(policy_version)
            except EngineLost as lost:
                logger.warning("%s The weights are sent again.", lost)
        return self._broadcast(policy_version)

    def _broadcast(self, policy_version: int) -> int:
        ranks = self.source.actors
        members = (*self.source.processes, *self.rollouts.members())
        if self.parcel is None or members != self.members:
            self._form_group()
            self.members = members
            self.parcel = ranks.call_all(TrainWorker.announce, self.name)[0]
        self.rollouts.settle()  # rank 0 waits for them, once it sends, no longer than GROUP_TIMEOUT_S
        sending = ranks.submit_all(TrainWorker.pack)
        self.rollouts.receive(self.parcel, policy_version, sending)
        self.rollouts.actors.when_back = lambda _: self.publish(policy_version)
        return self.parcel.num_bytes

    def _form_group(self) -> None:
        ranks = self.source.actors
        host, port = ranks.call(0, TrainWorker.address).result()
        size = self.rollouts.num_ranks + 1
        opening = ranks.call(0, TrainWorker.open_weight_group, host, port, size, self.backend)
        self.rollouts.join_group(self.name, host, port, size, self.backend)
        opening.result()
