"""Rollout workers: what runs in their processes (RolloutWorker), and what the driver holds (RolloutPool)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from frpo.actors._calls import (
    GONE,
    Actors,
    ProcessId,
    RemoteCall,
    failure_of,
    logger,
    this_process,
    wait_all,
    wait_until_back,
)
from frpo.actors._drawing import Engines, EngineSession, StaleWeights
from frpo.actors.transport import Parcel
from frpo.batching import flatten
from frpo.config import ModelConfig, RolloutConfig
from frpo.roles import WorkerFailed
from frpo.types import Floats, Group, Ints, Prompt, Sampling, Sequences, Ticket

Stream: TypeAlias = "Iterator[ObjectRef[tuple[Group, ...]]]"
"""Groups of one worker, those that end together as one; `ray.wait` takes it."""

MOST_DRAWS = 900
"""Of one engine. Ray lets 1,000 calls of an actor with coroutines run at once; what comes beside them, as new
weights do, waits for none of these."""


class EngineLost(WorkerFailed):
    """An engine died while it took in what cannot be sent to it alone."""


class RolloutWorker:
    """One vLLM engine and the policy version that it runs.

    `draw` is a coroutine, so Ray runs all methods in one thread: while draws wait, every other call comes
    between two steps of the engine, and one that steps it itself runs the draws on.
    """

    def __init__(
        self, model_path: str, model: ModelConfig, rollout: RolloutConfig, max_model_len: int
    ) -> None:
        from frpo.actors._sampler import Sampler

        self.sampler = Sampler(model_path, model, rollout, max_model_len)
        self.in_flight = rollout.in_flight
        self.version = -1
        self.num_batches = 0
        self.runner: asyncio.Task[None] | None = None

    def ping(self) -> ProcessId:
        return this_process()

    async def generate(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        policy_version: int,
    ) -> AsyncIterator[tuple[Group, ...]]:
        """Stream groups as they finish, those of one engine step together. What a batch draws depends on the
        batch alone, where nothing is drawn besides. Raises StaleWeights when another version is loaded, and
        ValueError naming a prompt that leaves no room for the completion."""
        if self.version != policy_version:
            raise StaleWeights(f"runs policy version {self.version}, asked for {policy_version}")
        for prompt in prompts:
            self.sampler.check_length(prompt, sampling)
        self.num_batches += 1
        waiting: dict[str, Ticket] = {}
        for number, prompt, seed in zip(indices, prompts, seeds, strict=True):
            ticket = Ticket(number, prompt, seed)
            waiting[self.sampler.begin(ticket, sampling, f"batch {self.num_batches}")] = ticket
        while waiting:
            self.sampler.step()
            done = [name for name in waiting if name in self.sampler.finished]
            if done:
                yield tuple(self.sampler.group_of(name, waiting.pop(name)) for name in done)
            await asyncio.sleep(0)

    async def draw(self, ticket: Ticket, sampling: Sampling, policy_version: int) -> Group:
        """One group, drawn beside all others that are asked for, by `policy_version` and newer ones. Raises
        as `generate`."""
        if self.version < policy_version:
            raise StaleWeights(f"runs policy version {self.version}, asked for {policy_version}")
        self.sampler.check_length(ticket.prompt, sampling)
        # a salt of its own: it may wait until other weights are there, and finds no prefix of these then
        self.num_batches += 1
        name = self.sampler.begin(ticket, sampling, f"batch {self.num_batches}")
        while name not in self.sampler.finished:
            if self.runner is None or self.runner.done():
                self.runner = asyncio.create_task(self._step())
            await self.runner
            if name not in self.sampler.running and name not in self.sampler.finished:
                raise asyncio.CancelledError
        return self.sampler.group_of(name, ticket)

    async def _step(self) -> None:
        """For all that wait; then calls that have come meanwhile have their turn."""
        self.sampler.step()
        await asyncio.sleep(0)

    def give_up(self) -> None:
        """All that is being drawn."""
        self.sampler.abort()

    def logprobs(self, sequences: Sequences) -> Floats:
        return self.ranked(sequences)[0]

    def ranked(self, sequences: Sequences) -> tuple[Floats, Ints]:
        """Raises StaleWeights when none were loaded."""
        if self.version < 0:
            raise StaleWeights("runs the weights that it started from")
        return self.sampler.ranked(sequences)

    def deliver(self, parcel: Parcel, version: int) -> None:
        """Take in a published version: what is being drawn goes on under it, or is finished first."""
        self.settle()
        parcel.deliver(self.sampler)
        self._now(version)

    def load_policy(self, folder: str, version: int) -> None:
        self.sampler.load_policy(Path(folder))
        self._now(version)

    def join_group(
        self, name: str, host: str, port: int, first_rank: int, world_size: int, backend: str
    ) -> None:
        self.sampler.join(name, host, port, first_rank, world_size, backend)

    def settle(self) -> None:
        """Finish what is being drawn, where it is not to go on under other weights. Nothing begins meanwhile:
        this call does not let others have their turn."""
        while self.sampler.running and not self.in_flight:
            self.sampler.step()

    def _now(self, version: int) -> None:
        self.version = version
        self.sampler.label(version)

    def sleep(self) -> None:
        self.sampler.sleep()

    def wake(self) -> None:
        self.sampler.wake()


class RolloutPool:
    """All rollout workers; implements roles.Rollouts. A restarted worker gets the current weights again."""

    def __init__(
        self,
        handles: Sequence[ActorHandle[RolloutWorker]],
        *,
        timeout_s: float,
        restarts: int,
        tensor_parallel: int,
        max_num_seqs: int,
    ) -> None:
        self.actors: Actors[RolloutWorker] = Actors(
            "rollout", handles, timeout_s=timeout_s, restarts=restarts
        )
        self.max_num_seqs = max_num_seqs
        self.num_published = 0
        self.restores_alone = True
        """Whether one engine can have the current weights again while the learner goes on: not where they are
        the learner's own, by a broadcast to all, which takes an idle one."""
        self.timeout_s, self.restarts, self.tensor_parallel = timeout_s, restarts, tensor_parallel

    @property
    def num_ranks(self) -> int:
        """Engines times tensor-parallel ranks."""
        return len(self.actors) * self.tensor_parallel

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
    ) -> Iterator[Group]:
        """Spread the prompts over the workers by index and yield groups from whoever finishes one.

        A worker that dies is waited for, given the weights again, and sent the same share again: the same
        batch in the same order draws the same completions, and groups that had arrived are not used twice.
        """
        self.actors.turn()
        num_workers = len(self.actors)

        def start(worker: int) -> Stream:
            share = range(worker, len(prompts), num_workers)
            return self.actors.stream(
                worker,
                RolloutWorker.generate,
                [prompts[i] for i in share],
                list(share),
                [seeds[i] for i in share],
                sampling,
                policy_version,
            )

        busy = range(min(num_workers, len(prompts)))
        streams = {start(worker): worker for worker in busy}
        arrived: set[int] = set()
        lives = dict.fromkeys(busy, self.restarts)
        while streams:
            stream = self._next_ready(streams)
            worker = streams[stream]
            try:
                groups = ray.get(next(stream), timeout=self.timeout_s)
            except StopIteration:
                del streams[stream]
                continue
            except (*GONE, RayTaskError) as error:
                self._recover(worker, error, lives)
                del streams[stream]
                streams[start(worker)] = worker
                continue
            for group in groups:
                if group.index not in arrived:
                    arrived.add(group.index)
                    yield group
        assert len(arrived) == len(prompts), "a rollout stream ended early"

    def open(self, sampling: Sampling) -> EngineSession:
        """Each engine has as much in hand as it runs at once, and as much again."""

        def draw(worker: int, ticket: Ticket, policy_version: int) -> ObjectRef[Group]:
            return self.actors.submit(worker, RolloutWorker.draw, ticket, sampling, policy_version)

        def give_up() -> None:
            """Without a wait: whatever is asked next comes after it, and one that is dead has given up."""
            self.actors.submit_all(RolloutWorker.give_up)

        def restore(worker: int, idle: bool) -> bool:
            if idle or self.restores_alone:
                self.actors.when_back(worker)
            return idle or self.restores_alone

        at_once = -(-self.max_num_seqs // sampling.num_completions)
        room = min(2 * at_once, MOST_DRAWS)
        engines = Engines(self.actors, draw, give_up, restore, lambda: self.num_published, room)
        return EngineSession(engines)

    def _next_ready(self, streams: Mapping[Stream, int]) -> Stream:
        """One that has something, or raises WorkerFailed after `timeout_s` seconds."""
        ready, _ = ray.wait(list(streams), num_returns=1, timeout=self.timeout_s)
        if not ready:
            names = ", ".join(self.actors.name(worker) for worker in streams.values())
            raise WorkerFailed(f"{names} finished no group within {self.timeout_s:g} s.")
        return cast(Stream, ready[0])

    def _recover(self, worker: int, error: RayError, lives: dict[int, int]) -> None:
        """Bring a restarted worker back to the current weights, or raise WorkerFailed."""
        name = self.actors.name(worker)
        if isinstance(error, RayTaskError) and not isinstance(error.cause, StaleWeights):
            raise failure_of(name, "generate", error) from None
        if isinstance(error, RayTaskError) and lives[worker] == 0:
            raise WorkerFailed(
                f"{name} was given the weights {self.restarts} times and still {error.cause} "
                "(cluster.max_restarts)"
            ) from None
        if isinstance(error, ActorDiedError) or lives[worker] == 0:
            raise WorkerFailed(
                f"{name} died and may not be restarted again (cluster.max_restarts = {self.restarts}): "
                f"{error}"
            ) from None
        lives[worker] -= 1
        logger.warning("%s was killed; it draws its share again when it is back", name)
        wait_until_back(name, self.actors.handles[worker])
        self.actors.when_back(worker)

    def logprobs(self, sequences: Sequences) -> Floats:
        return np.stack(self.actors.call_all(RolloutWorker.logprobs, sequences))

    def ranked(self, pairs: Sequence[tuple[Ints, Ints]]) -> tuple[Floats, Ints]:
        """Log-probs and ranks of the completion tokens of (prompt ids, completion ids) pairs, both [sum of
        completion lengths]; the pairs are shared out over the engines."""
        cuts = [len(pairs) * i // len(self.actors) for i in range(len(self.actors) + 1)]
        shares = [flatten(pairs[start:end]) for start, end in itertools.pairwise(cuts)]
        calls = [
            self.actors.call(worker, RolloutWorker.ranked, share)
            for worker, share in enumerate(shares)
            if len(share)
        ]
        logprobs, ranks = zip(*wait_all(calls), strict=True)
        return np.concatenate(logprobs), np.concatenate(ranks)

    def deliver(self, parcel: Parcel, version: int) -> None:
        """Give every engine a published version; what it holds in the object store is kept until the next."""
        self._keep_current(lambda worker: self.actors.call(worker, RolloutWorker.deliver, parcel, version))

    def load_policy(self, folder: Path, version: int) -> None:
        """Give every engine the weights of a saved policy (Hugging Face or PEFT folder)."""
        path = str(folder)
        self._keep_current(lambda worker: self.actors.call(worker, RolloutWorker.load_policy, path, version))

    def _keep_current(self, load: Callable[[int], RemoteCall[None]]) -> None:
        """Load weights now, and again into whoever is restarted later."""
        self.forget()  # one that dies while it loads is simply asked again
        wait_all([load(worker) for worker in range(len(self.actors))])
        self.actors.when_back = lambda worker: load(worker).result()
        self.num_published += 1
        self.restores_alone = True

    def forget(self) -> None:
        """Restarted engines get no weights until the next are loaded; those in the object store may go."""
        self.actors.when_back = lambda _: None

    def members(self) -> tuple[ProcessId, ...]:
        """The process of every engine: another one means that it was restarted."""
        return tuple(self.actors.call_all(RolloutWorker.ping))

    def join_group(self, name: str, host: str, port: int, world_size: int, backend: str) -> None:
        calls = []
        for worker in range(len(self.actors)):
            first_rank = 1 + worker * self.tensor_parallel
            calls.append(
                self.actors.call(
                    worker, RolloutWorker.join_group, name, host, port, first_rank, world_size, backend
                )
            )
        wait_all(calls)

    def settle(self) -> None:
        """Let every engine come to where it takes new weights in."""
        self.actors.call_all(RolloutWorker.settle)

    def receive(self, parcel: Parcel, version: int, sending: Sequence[RemoteCall[Any]]) -> None:
        """As `deliver`, of one that is on its way now, by the calls `sending`. Where these fail, engines do
        for missing them; what is raised is of these then. Raises EngineLost where an engine was killed: what
        others have is in doubt until it is sent once more."""
        engines: Actors[RolloutWorker] = Actors("rollout", self.actors.handles, timeout_s=self.timeout_s)
        engines.turn, engines.died = self.actors.turn, EngineLost
        wait_all([*sending, *engines.submit_all(RolloutWorker.deliver, parcel, version)])
        self.num_published += 1
        self.restores_alone = False

    def sleep(self) -> None:
        self.actors.call_all(RolloutWorker.sleep)

    def wake(self) -> None:
        self.actors.call_all(RolloutWorker.wake)

    def take_turn(self) -> None:
        self.actors.turn()
