"""What learners and fine-tune workers share: a rank of a DeepSpeed job, its engine, and the way its weights
take out.

The one place of inheritance in the project: Ray serves the methods of one class, and these are the same
fourteen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.actor import ActorHandle

from actors import _calls
from actors._gather import Block, Dealt, Logprobs, deal
from frpo.batching import blocks_of
from frpo.roles import Pending, WorkerFailed
from frpo.shape import BUDGET_TOKENS
from frpo.types import Floats, Group, Sequences, Written

if TYPE_CHECKING:
    from actors._engine import Engine
    from actors.transport import Parcel, Transport
    from actors.transport.group import Announced


class TrainWorker:
    """One rank. Methods marked "all ranks" are collective: the pool calls them on every rank."""

    def __init__(self, rank: int, world_size: int, transport: Transport) -> None:
        self.rank, self.world_size, self.transport = rank, world_size, transport
        self.engine: Engine | None = None

    def ping(self) -> int:
        """Import what training needs, so that the long start happens while others start too."""
        import deepspeed  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401

        return os.getpid()

    def address(self) -> tuple[str, int]:
        from actors.transport.group import free_address

        return free_address()

    def join(self, host: str, port: int) -> None:
        """All ranks."""
        from actors import _dist

        _dist.join(host, port, self.rank, self.world_size)

    def _engine(self) -> Engine:
        if self.engine is None:
            raise RuntimeError("no policy is being trained: call start() first")
        return self.engine

    def logprobs(self, sequences: Sequences) -> Floats | None:
        """All ranks; rank 0 answers."""
        found = self._engine().logprobs(sequences)
        return found if self.rank == 0 else None

    def score(self, temperature: float, start: bool, blocks: list[Block]) -> list[list[Logprobs]]:
        """Log-probs of blocks under the policy in training, or the one that it began from, by this rank
        alone."""
        return self._engine().scores(blocks, temperature, start=start)

    def score_together(self, temperature: float, start: bool, blocks: list[Block]) -> list[list[Logprobs]]:
        """All ranks: the same of every block; each rank answers for those that are dealt to it."""
        return self._engine().scores(blocks, temperature, start=start, together=True)

    def save(self, folder: str) -> None:
        """All ranks."""
        self._engine().save(Path(folder))

    def written(self) -> list[Written] | None:
        return self._engine().written()

    def load(self, folder: str) -> None:
        """All ranks."""
        self._engine().load(Path(folder))

    def export(self, folder: str, merged: bool) -> None:
        """All ranks."""
        self._engine().export(Path(folder), merged=merged)

    def pack(self) -> Parcel | None:
        """All ranks; rank 0 answers with the weights as they travel."""
        return self.transport.pack(self._engine())

    def open_weight_group(self, host: str, port: int, world_size: int, backend: str) -> None:
        """Rank 0: host the group of this rank and every engine."""
        self._group().open(host, port, world_size, backend)

    def announce(self, group: str) -> Announced:
        """All ranks: what pack() will broadcast."""
        return self._group().announce(self._engine(), group)

    def _group(self) -> Any:
        from actors.transport.group import GroupTransport

        assert isinstance(self.transport, GroupTransport), "rollout.transport is no process group"
        return self.transport

    def offload(self) -> None:
        """Leave the GPU to another role (weights, gradients and optimiser go to host memory)."""
        if self.engine is not None:
            self.engine.offload()

    def reload(self) -> None:
        if self.engine is not None:
            self.engine.reload()

    def stop(self) -> None:
        """Free the engine; the process stays for the next policy."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


class TrainPool:
    """All ranks of one DeepSpeed job. A rank that dies ends the run: it is resumed from the last
    checkpoint."""

    def __init__(self, role: str, handles: Sequence[ActorHandle[Any]], *, timeout_s: float) -> None:
        self.actors = _calls.Actors(role, handles, timeout_s=timeout_s)
        self.together = False
        """Whether no rank can compute alone: under ZeRO-3 each holds a part of the weights."""

    def join(self) -> None:
        """Form the group of ranks; once, before the first start."""
        host, port = self.actors.call(0, "address").result()
        self.actors.call_all("join", host, port)

    def logprobs(self, sequences: Sequences) -> Floats:
        found: Floats = self.actors.call_all("logprobs", sequences)[0]
        return found

    def submit(self, groups: Sequence[Group], temperature: float = 1.0) -> Dealt:
        """Log-probs of every completion under the policy in training, in the blocks that saved policies are
        scored in."""
        return self.ask(blocks_of(groups, BUDGET_TOKENS), temperature)

    def ask(
        self, blocks: Sequence[Block], temperature: float, *, start: bool = False, first: int = 0
    ) -> Dealt:
        """`start`: under the policy that training began from, with its adapter switched off."""
        if not self.together:
            return deal(self.actors, "score", temperature, start, blocks=blocks, first=first)
        calls = [
            self.actors.call(rank, "score_together", temperature, start, list(blocks))
            for rank in range(len(self.actors))
        ]
        return Dealt(calls, len(blocks))

    def save(self, folder: Path) -> RanksWriting:
        """The ranks may be asked for more as soon as this returns."""
        self.actors.call_all("save", str(folder.absolute()))
        return RanksWriting(self.actors)

    def load(self, folder: Path) -> None:
        self.actors.call_all("load", str(folder.absolute()))

    def export(self, folder: Path, *, merged: bool = False) -> None:
        """`merged`: a full folder, where an adapter was trained too."""
        self.actors.call_all("export", str(folder.absolute()), merged)

    def pack(self) -> Pending[Parcel]:
        first, *others = [self.actors.call(rank, "pack") for rank in range(len(self.actors))]
        return Together(first, others)

    def announce(self, group: str) -> Announced:
        found: Announced = self.actors.call_all("announce", group)[0]
        return found

    def weight_address(self) -> tuple[str, int]:
        found: tuple[str, int] = self.actors.call(0, "address").result()
        return found

    def open_weight_group(self, host: str, port: int, world_size: int, backend: str) -> Pending[None]:
        return self.actors.call(0, "open_weight_group", host, port, world_size, backend)

    def offload(self) -> None:
        self.actors.call_all("offload")

    def reload(self) -> None:
        self.actors.call_all("reload")

    def stop(self) -> None:
        self.actors.call_all("stop")


class Together:
    """Several calls that end together, with the answer of the first."""

    def __init__(self, first: Pending[Parcel], others: Sequence[Pending[None]]) -> None:
        self.first, self.others = first, others

    def ready(self) -> bool:
        return self.first.ready() and all(call.ready() for call in self.others)

    def result(self) -> Parcel:
        found = self.first.result()
        for call in self.others:
            call.result()
        return found


class RanksWriting:
    """A checkpoint that the ranks write beside their other work; the answer lists the files of all. Each rank
    is asked until it is done. Implements roles.Writing."""

    def __init__(self, actors: _calls.Actors) -> None:
        self.actors = actors
        self.done: dict[int, list[Written]] = {}

    def ready(self) -> bool:
        return self._ready(self.actors.timeout_s)

    def _ready(self, limit_s: float) -> bool:
        for rank in range(len(self.actors)):
            if (
                rank not in self.done
                and (files := self.actors.beside(rank, "written", limit_s).result()) is not None
            ):
                self.done[rank] = files
        return len(self.done) == len(self.actors)

    def result(self, limit_s: float | None = None) -> list[Written]:
        limit = self.actors.timeout_s if limit_s is None else limit_s
        deadline = time.monotonic() + limit
        while not self._ready(max(1.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                late = ", ".join(
                    self.actors.name(rank) for rank in range(len(self.actors)) if rank not in self.done
                )
                raise WorkerFailed(f"{late} did not finish writing a checkpoint within {limit:g} s.")
            time.sleep(0.05)
        return [file for rank in sorted(self.done) for file in self.done[rank]]
