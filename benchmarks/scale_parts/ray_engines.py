"""The same loop with real Ray: engines are few actors that answer for many, in real shapes and at once."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import ray

from frpo.actors._drawing import EngineSession
from frpo.actors.reward import RewardPool
from frpo.actors.rollout import RolloutPool
from frpo.types import Floats, Group, Reward, Sampling, Sequences, Ticket

from .driver import (
    PROMPT_TOKENS,
    ROOM,
    TOKENS,
    Cost,
    Idle,
    K,
    Load,
    RealPrompts,
    make_completions,
    measure_loop,
    profile_loop,
)

PROCESSES = 4
STORE_BYTES = 3 * 2**30
LONG_S = 60.0
SEVERAL = 8
"""Groups of a call, in the way of `measure_ways` that asks for several."""


class ManyEngines:
    """An actor that answers for many engines: a group of K completions, each time serialized anew."""

    def __init__(self, by_reference: bool) -> None:
        self.by_reference = by_reference
        self.completions: dict[tuple[int, int], Any] = {}
        self.rewards = tuple(Reward(i / K, {"only": i / K}) for i in range(K))

    async def draw(self, ticket: Ticket, sampling: Sampling, policy_version: int) -> Group:
        if sampling.max_new_tokens == 1:  # of `notice_death`
            await asyncio.sleep(LONG_S)
        kind = policy_version, ticket.number % SEVERAL  # arrays that are the same object are sent once
        if kind not in self.completions:
            self.completions[kind] = make_completions(policy_version)
        group = Group(ticket.number, ticket.prompt, self.completions[kind])
        return self._stand_in(group) if self.by_reference else group

    def _stand_in(self, group: Group) -> Group:
        """Completions of one token each: what the loop itself reads of a group, beside a reference to all
        of it."""
        completions = make_completions(group.policy_version, tokens=1, characters=0)
        prompt = replace(group.prompt, columns={"group": ray.put(group)})
        return Group(group.index, prompt, completions)

    async def draw_one(self, asked: tuple[Ticket, Sampling, int]) -> Group:
        return await self.draw(*asked)

    async def draw_pickled(self, asked: bytes) -> Group:
        return await self.draw(*pickle.loads(asked))

    async def draw_several(self, tickets: list[Ticket], sampling: Sampling, version: int) -> list[Group]:
        return [await self.draw(ticket, sampling, version) for ticket in tickets]

    async def nothing(self, *asked: Any) -> None: ...

    async def score(self, group: Group) -> tuple[Reward, ...]:
        return self.rewards

    async def ping(self) -> int:
        return os.getpid()

    async def give_up(self) -> None: ...


class RealRollouts:
    """`engines` handles, of `PROCESSES` actors in turn."""

    def __init__(self, actors: list[Any], engines: int) -> None:
        handles = [actors[i % len(actors)] for i in range(engines)]
        self.pool = RolloutPool(handles, timeout_s=120, restarts=1, tensor_parallel=1, max_num_seqs=ROOM)

    def open(self, sampling: Sampling) -> EngineSession:
        return self.pool.open(sampling)

    def logprobs(self, sequences: Sequences) -> Floats:
        return np.zeros((1, sequences.num_completion_tokens), np.float32)


class ScoredElsewhere(Idle):
    """Rewards by the real RewardPool: each group goes out again."""

    def __init__(self, actors: list[Any]) -> None:
        super().__init__()
        self.pool = RewardPool(actors, timeout_s=120, restarts=0)

    def score(self, group: Group) -> Any:
        self.first = self.first or group
        return self.pool.score(group)


@contextmanager
def start_engines(by_reference: bool = False) -> Iterator[list[Any]]:
    """Actors in a Ray of their own."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = os.pathsep.join([here, os.path.join(here, "benchmarks")])
    ray.init(
        num_cpus=PROCESSES,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    try:
        remote: Any = ray.remote(ManyEngines)
        options = remote.options(max_restarts=1, max_concurrency=4096, num_cpus=0.1)
        actors = [options.remote(by_reference) for _ in range(PROCESSES)]
        ray.get([actor.ping.remote() for actor in actors])
        yield actors
    finally:
        ray.shutdown()


def notice_death(actors: list[Any], engines: int = 64) -> dict[str, float]:
    """One of the processes is killed in the middle of all drawings: seconds until the session tells, and
    until the engines have room again."""
    session = RealRollouts(actors, engines).open(Sampling(num_completions=K, max_new_tokens=1))
    prompt = RealPrompts(1).at(0)
    for number in range(engines):
        session.begin(Ticket(number, prompt, 0), 0)
    room = session.room
    pid = ray.get(actors[0].ping.remote())
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    lost: list[int] = []
    first_s = None
    while len(lost) < engines // len(actors):
        lost += session.wait().lost
        first_s = first_s or time.perf_counter() - began
    all_s = time.perf_counter() - began
    while session.away:
        session.wait()
    assert first_s is not None
    back_s = time.perf_counter() - began
    assert session.room > room
    return {"lost": len(lost), "first_s": first_s, "all_s": all_s, "back_s": back_s}


def measure_session(actors: list[Any], groups: int) -> dict[str, float]:
    """EngineSession alone: no batch is made."""
    session = RealRollouts(actors, 64).open(Sampling(num_completions=K, max_new_tokens=TOKENS))
    prompt = RealPrompts(1).at(0)
    begin_s = 0.0
    begun = missing = 0
    before = Cost.now()
    while begun < groups or missing:
        while begun < groups and session.room:
            began = time.thread_time()
            session.begin(Ticket(begun, prompt, 0), 0)
            begin_s += time.thread_time() - began
            begun += 1
            missing += 1
        missing -= len(session.wait().groups)
    row = Cost.now().since(before, groups * K)
    return {"begin_us": 1e6 * begin_s / groups / K, **row}


def measure_ways(actors: list[Any], groups: int) -> dict[str, dict[str, float]]:
    """What a group costs by other ways than EngineSession's, a Future for each call as there."""
    sampling = Sampling(num_completions=K, max_new_tokens=TOKENS)
    tickets = [Ticket(number, RealPrompts(1).at(number), 0) for number in range(SEVERAL)]
    asked = (tickets[0], sampling, 0)
    ways: dict[str, tuple[Callable[[Any], Any], int]] = {
        "nothing": (lambda actor: actor.nothing.remote(), 1),
        "no_answer": (lambda actor: actor.nothing.remote(*asked), 1),
        "as_it_is": (lambda actor: actor.draw.remote(*asked), 1),
        "one_argument": (lambda actor: actor.draw_one.remote(asked), 1),
        "pickled": (lambda actor: actor.draw_pickled.remote(pickle.dumps(asked, protocol=5)), 1),
        "several_a_call": (lambda actor: actor.draw_several.remote(tickets, sampling, 0), SEVERAL),
    }
    rows = {}
    for name, (submit, per_call) in ways.items():
        call_all(actors, submit, groups // 8)
        before = Cost.now()
        call_all(actors, submit, groups // per_call)
        rows[name] = Cost.now().since(before, groups * K)
    return rows


def call_all(actors: list[Any], submit: Callable[[Any], Any], calls: int, at_once: int = 128) -> None:
    """With as many under way as the session of 64 engines has."""
    ended: SimpleQueue[Any] = SimpleQueue()
    begun = missing = 0
    while begun < calls or missing:
        while begun < calls and missing < at_once:
            submit(actors[begun % len(actors)]).future().add_done_callback(ended.put)
            begun += 1
            missing += 1
        ended.get().result()
        missing -= 1


def measure_with_ray(quick: bool) -> dict[str, Any]:
    load = Load(prompts=64, steps=1) if quick else Load(prompts=256, steps=4)
    groups = 64 if quick else 1024
    result: dict[str, Any] = {
        "processes": PROCESSES,
        "completions": load.completions,
        "tokens_per_completion": TOKENS,
        "tokens_per_prompt": PROMPT_TOKENS,
    }
    with start_engines() as actors:
        rows = []
        for engines in (16,) if quick else (16, 64, 256, 1024):
            rows.append({"engines": engines, **measure_loop(load, RealRollouts(actors, engines), Idle())})
        result["by_engines"] = rows
        result["session_alone"] = measure_session(actors, groups)
        result["ways"] = measure_ways(actors, groups)
        if quick:
            return result
        result["with_rewards"] = measure_loop(load, RealRollouts(actors, 64), ScoredElsewhere(actors))
        result["profile"] = profile_loop(load, RealRollouts(actors, 64), ScoredElsewhere(actors))
        result["dead_engine"] = notice_death(actors)
    with start_engines(by_reference=True) as actors:
        result["by_reference"] = {
            "session_alone": measure_session(actors, groups),
            "loop": measure_loop(load, RealRollouts(actors, 64), Idle()),
            "with_rewards": measure_loop(load, RealRollouts(actors, 64), ScoredElsewhere(actors)),
        }
    return result
