"""What learners and fine-tune workers share: a rank of a DeepSpeed job, its engine, and the way its weights
take out.

Ray serves the methods of one class, so both kinds of rank inherit these; both kinds of pool, their calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import ray
from ray.actor import ActorHandle

from frpo.actors._blocks import Block, Logprobs
from frpo.actors._calls import (
    Actors,
    ProcessId,
    RemoteCall,
    StartedAnew,
    has_failed,
    this_process,
    wait_all,
    wait_until_back,
)
from frpo.actors._gather import BlockScores, Dealt, deal_out
from frpo.batching import blocks_of
from frpo.roles import Pending, RankDied, WorkerFailed
from frpo.shape import BUDGET_TOKENS
from frpo.types import Floats, Group, Sequences, Written

if TYPE_CHECKING:
    from frpo.actors._engine import Engine
    from frpo.actors.transport import Parcel, Transport
    from frpo.actors.transport.group import Announced, GroupTransport

T = TypeVar("T")


class TrainWorker:
    """One rank. Methods marked "all ranks" are collective: the pool calls them on every rank."""

    def __init__(self, rank: int, world_size: int, transport: Transport) -> None:
        self.rank, self.world_size, self.transport = rank, world_size, transport
        self.engine: Engine | None = None
        self.joined = False

    def ping(self) -> ProcessId:
        """Import what training needs, so that the long start happens while others start too."""
        import deepspeed  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401

        return this_process()

    def address(self) -> tuple[str, int]:
        from frpo.actors.transport.group import free_address

        return free_address()

    def join(self, host: str, port: int) -> None:
        """All ranks."""
        from frpo.actors import _dist

        _dist.join_ranks(host, port, self.rank, self.world_size)
        self.joined = True

    def _check_joined(self) -> None:
        """Raises StartedAnew in a process that is none of the job's."""
        if not self.joined:
            raise StartedAnew("no rank of a job")

    def _engine(self) -> Engine:
        self._check_joined()
        if self.engine is None:
            raise RuntimeError("no policy is being trained: call start() first")
        return self.engine

    def logprobs(self, sequences: Sequences) -> Floats | None:
        """All ranks; rank 0 answers."""
        logprobs = self._engine().logprobs(sequences)
        return logprobs if self.rank == 0 else None

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

    def _group(self) -> GroupTransport:
        from frpo.actors.transport.group import GroupTransport

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


W = TypeVar("W", bound=TrainWorker)


class TrainPool(Generic[W]):
    """All ranks of one DeepSpeed job. None is of use without the others: when one dies, the call that finds
    it out raises RankDied, and `revive` starts all anew, as often as the ranks may be restarted."""

    def __init__(
        self,
        job: Literal["learner", "fine-tune"],
        handles: Sequence[ActorHandle[W]],
        *,
        timeout_s: float,
        restarts: int = 0,
    ) -> None:
        self.actors: Actors[W] = Actors(job, handles, timeout_s=timeout_s)
        self.actors.died = partial(RankDied, job)
        self.lives, self.restarts = restarts, restarts
        self.together = False
        """Whether no rank can compute alone: under ZeRO-3 each holds a part of the weights."""

    def join(self) -> None:
        """Form the group of ranks, each in a fresh process."""
        self.processes = self.actors.call_all(TrainWorker.ping)
        host, port = self.actors.call(0, TrainWorker.address).result()
        self.actors.call_all(TrainWorker.join, host, port)

    def revive(self) -> None:
        if not self.lives:
            raise WorkerFailed(
                f"A rank of the {self.actors.role} died and its job may not be started anew again "
                f"(cluster.max_restarts = {self.restarts})."
            )
        self.lives -= 1
        for handle in self.actors.handles:
            ray.kill(handle, no_restart=False)
        for rank, (handle, old) in enumerate(zip(self.actors.handles, self.processes, strict=True)):
            self.processes[rank] = wait_until_back(self.actors.name(rank), handle, other_than=old)
        self.join()

    def logprobs(self, sequences: Sequences) -> Floats:
        return of_rank_0(self.actors.call_all(TrainWorker.logprobs, sequences))

    def submit(self, groups: Sequence[Group], temperature: float = 1.0) -> Dealt:
        """Log-probs of every completion under the policy in training, in the blocks that saved policies are
        scored in."""
        return self.ask(blocks_of(groups, BUDGET_TOKENS), temperature)

    def ask(
        self, blocks: Sequence[Block], temperature: float, *, start: bool = False, first: int = 0
    ) -> Dealt:
        """`start`: under the policy that training began from, with its adapter switched off."""
        if self.together:
            calls = self.actors.submit_all(TrainWorker.score_together, temperature, start, list(blocks))
            return Dealt(calls, len(blocks))

        def score(rank: int, hand: list[Block]) -> RemoteCall[BlockScores]:
            return self.actors.call(rank, TrainWorker.score, temperature, start, hand)

        return deal_out(blocks, len(self.actors), score, first)

    def save(self, folder: Path) -> RanksWriting:
        """The ranks may be asked for more as soon as this returns."""
        self.actors.call_all(TrainWorker.save, str(folder.absolute()))
        return RanksWriting(self.actors)

    def load(self, folder: Path) -> None:
        self.actors.call_all(TrainWorker.load, str(folder.absolute()))

    def export(self, folder: Path, *, merged: bool = False) -> None:
        """`merged`: a full folder, where an adapter was trained too."""
        self.actors.call_all(TrainWorker.export, str(folder.absolute()), merged)

    def pack(self) -> Pending[Parcel]:
        """What rank 0 packs, when all ranks are through."""
        return OfRank0(self.actors.submit_all(TrainWorker.pack))

    def offload(self) -> None:
        self.actors.call_all(TrainWorker.offload)

    def reload(self) -> None:
        self.actors.call_all(TrainWorker.reload)

    def stop(self) -> None:
        self.actors.call_all(TrainWorker.stop)


def of_rank_0(answers: Sequence[T | None]) -> T:
    """Of a call of all ranks that rank 0 answers."""
    answer = answers[0]
    assert answer is not None
    return answer


class OfRank0(Generic[T]):
    """Calls of all ranks, with the answer of the first; over as soon as one of them fails. Implements
    roles.Running."""

    def __init__(self, calls: Sequence[RemoteCall[T | None]]) -> None:
        self.calls = calls
        self.futures = [call.future() for call in calls]

    def ready(self) -> bool:
        return all(future.done() for future in self.futures) or any(map(has_failed, self.futures))

    def result(self) -> T:
        return of_rank_0(wait_all(self.calls))

    def on_ready(self, call: Callable[[], None]) -> None:
        def look(_: object) -> None:
            if self.ready():
                call()

        for future in self.futures:
            future.add_done_callback(look)


class RanksWriting:
    """A checkpoint that the ranks write beside their other work; the answer lists the files of all. Each rank
    is asked until it is done. Implements roles.Writing."""

    def __init__(self, actors: Actors[Any]) -> None:
        self.actors = actors
        self.done: dict[int, list[Written]] = {}

    def ready(self) -> bool:
        return self._ready(self.actors.timeout_s)

    def _ready(self, limit_s: float) -> bool:
        for rank in self._late():
            files = self.actors.call_beside(rank, TrainWorker.written, limit_s).result()
            if files is not None:
                self.done[rank] = files
        return not self._late()

    def _late(self) -> list[int]:
        return [rank for rank in range(len(self.actors)) if rank not in self.done]

    def result(self, limit_s: float | None = None) -> list[Written]:
        limit = self.actors.timeout_s if limit_s is None else limit_s
        deadline = time.monotonic() + limit
        while not self._ready(max(1.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                late = ", ".join(self.actors.name(rank) for rank in self._late())
                raise WorkerFailed(f"{late} did not finish writing a checkpoint within {limit:g} s.")
            time.sleep(0.05)
        files: list[Written] = []
        for rank in sorted(self.done):
            files += self.done[rank]
        return files
