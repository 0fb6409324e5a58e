"""How a version of the policy travels from whoever trains it to every rollout engine.

A transport has two ends. One stays with the ranks that train and makes a parcel of their weights; the parcel
is the other: it knows how an engine takes it in. The publisher of a pool that trains brings parcels to the
engines. The ways:

- `store`: all weights through Ray's object store;
- `adapter`: a LoRA adapter alone, the same way, which vLLM applies unmerged;
- `group`: all weights by a broadcast (gloo, NCCL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from frpo.config import Config

if TYPE_CHECKING:
    from frpo.actors._engine import Engine
    from frpo.actors._sampler import Sampler


class Parcel(Protocol):
    """One version on its way; what an engine is handed."""

    @property
    def num_bytes(self) -> int:
        """What one engine is sent."""
        ...

    def deliver(self, sampler: Sampler) -> None:
        """In the engine's process: make `sampler` run this version."""
        ...


class Transport(Protocol):
    """The end that stays with the ranks that train."""

    def pack(self, engine: Engine) -> Parcel | None:
        """All ranks, since ZeRO-3 gathers weights from all of them; rank 0 has the parcel."""
        ...


def transport_of(config: Config) -> Transport:
    from frpo.actors.transport.adapter import AdapterTransport
    from frpo.actors.transport.group import GroupTransport
    from frpo.actors.transport.store import StoreTransport

    if config.sends_adapters:
        return AdapterTransport()
    if config.rollout.transport == "object_store":
        return StoreTransport()
    return GroupTransport()
