"""Rollout workers: what runs in their processes (RolloutWorker), and what the driver holds (RolloutPool)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from actors._calls import Actors, failure_of, wait_all, wait_until_back
from actors.transport import Parcel
from frpo.batching import flatten
from frpo.config import ModelConfig, RolloutConfig
from frpo.roles import WorkerFailed
from frpo.types import Floats, Group, Ints, Prompt, Sampling, Sequences

Stream: TypeAlias = "Iterator[ObjectRef[tuple[Group, ...]]]"
"""Groups of one worker, those that end together as one; `ray.wait` takes it."""


class StaleWeights(RuntimeError):
    """The worker does not run the policy version that it was asked to draw from (it was restarted)."""


class RolloutWorker:
    """One vLLM engine and the policy version that it runs."""

    def __init__(
        self, model_path: str, model: ModelConfig, rollout: RolloutConfig, max_model_len: int
    ) -> None:
        from actors._sampler import Sampler

        self.sampler = Sampler(model_path, model, rollout, max_model_len)
        self.version = -1

    def ping(self) -> int:
        return os.getpid()

    def generate(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        policy_version: int,
    ) -> Iterator[tuple[Group, ...]]:
        """Stream groups as they finish. Raises StaleWeights when another version is loaded."""
        if self.version != policy_version:
            raise StaleWeights(f"runs policy version {self.version}, asked for {policy_version}")
        yield from self.sampler.generate(prompts, indices, seeds, sampling, policy_version)

    def logprobs(self, sequences: Sequences) -> Floats:
        return self.sampler.logprobs(sequences)

    def ranked(self, sequences: Sequences) -> tuple[Floats, Ints]:
        return self.sampler.ranked(sequences)

    def deliver(self, parcel: Parcel, version: int) -> None:
        """Take in a published version."""
        parcel.deliver(self.sampler)
        self._now(version)

    def load_policy(self, folder: str, version: int) -> None:
        self.sampler.load_policy(Path(folder))
        self._now(version)

    def join_group(
        self, name: str, host: str, port: int, first_rank: int, world_size: int, backend: str
    ) -> None:
        self.sampler.join(name, host, port, first_rank, world_size, backend)

    def _now(self, version: int) -> None:
        self.sampler.reset_cache()
        self.version = version

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
    ) -> None:
        self.actors: Actors[RolloutWorker] = Actors(
            "rollout", handles, timeout_s=timeout_s, restarts=restarts
        )
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
            except (RayActorError, RayTaskError) as error:
                self._recover(worker, error, lives)
                del streams[stream]
                streams[start(worker)] = worker
                continue
            for group in groups:
                if group.index not in arrived:
                    arrived.add(group.index)
                    yield group
        assert len(arrived) == len(prompts), "a rollout stream ended early"

    def _next_ready(self, streams: Mapping[Stream, int]) -> Stream:
        """One that has something, or raises WorkerFailed after `timeout_s` seconds."""
        ready, _ = ray.wait(list(streams), num_returns=1, timeout=self.timeout_s)
        if not ready:
            names = ", ".join(self.actors.name(worker) for worker in streams.values())
            raise WorkerFailed(f"{names} finished no group within {self.timeout_s:g} s.")
        return cast(Stream, ready[0])

    def _recover(self, worker: int, error: RayActorError | RayTaskError, lives: dict[int, int]) -> None:
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
        wait_until_back(name, self.actors.handles[worker])
        self.actors.when_back()

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
        self._keep_current(lambda: self.actors.call_all(RolloutWorker.deliver, parcel, version))

    def load_policy(self, folder: Path, version: int) -> None:
        """Give every engine the weights of a saved policy (Hugging Face or PEFT folder)."""
        self._keep_current(lambda: self.actors.call_all(RolloutWorker.load_policy, str(folder), version))

    def _keep_current(self, load: Callable[[], object]) -> None:
        """Load weights now, and again into whoever is restarted later."""
        self.forget()  # one that dies while it loads is simply asked again
        load()
        self.actors.when_back = load

    def forget(self) -> None:
        """Restarted engines get no weights until the next are loaded; those in the object store may go."""
        self.actors.when_back = lambda: None

    def members(self) -> tuple[int, ...]:
        """The process of every engine: another number means that it was restarted."""
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

    def receive(self, parcel: Parcel, version: int) -> None:
        """As `deliver`, of one that is on its way now and cannot be had again."""
        self.actors.call_all(RolloutWorker.deliver, parcel, version)

    def sleep(self) -> None:
        self.actors.call_all(RolloutWorker.sleep)

    def wake(self) -> None:
        self.actors.call_all(RolloutWorker.wake)

    def take_turn(self) -> None:
        self.actors.turn()
