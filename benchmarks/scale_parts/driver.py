"""CPU time of the driver's process for a completion, in the real loop ahead of the learner, on the real
clock: engines that answer at once, in real shapes, and partners that do nothing."""

from __future__ import annotations

import cProfile
import pickle
import pstats
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from frpo.actors._drawing import EngineSession
from frpo.actors.rollout import RolloutPool
from frpo.config import Config
from frpo.driver import Partners, Start
from frpo.driver_ahead import train_ahead
from frpo.steering import begin_steering
from frpo.types import Completion, Floats, Group, Prompt, Reward, RolloutBatch, Sampling, Sequences, Ticket

from .engines import Speed
from .partners import UPDATE
from .rollouts import Drawing
from .simulation import Lengths, Scenario, make_config

K = 8
PROMPT_TOKENS, TOKENS, CHARACTERS = 300, 1500, 6000
"""Of a prompt and of a completion."""
ROOM = 16
"""max_num_seqs: two groups at once, and two in hand."""
STALENESS = 2


def make_completions(
    version: int, tokens: int = TOKENS, characters: int = CHARACTERS
) -> tuple[Completion, ...]:
    """K of them, in arrays of their own."""
    completions = []
    for i in range(K):
        draw = np.random.default_rng(i)
        ids = draw.integers(0, 150_000, tokens, dtype=np.int32)
        logprobs = -draw.random(tokens, dtype=np.float32)
        versions = np.full(tokens, version, np.int32)
        completions.append(Completion(ids, logprobs, versions, "a" * characters, "stop"))
    return tuple(completions)


class RealPrompts:
    """Prompts of a real length."""

    def __init__(self, per_step: int) -> None:
        self.per_step = per_step
        self.token_ids = np.arange(PROMPT_TOKENS, dtype=np.int32)

    def take(self, step: int) -> tuple[Prompt, ...]:
        return tuple(map(self.at, range(step * self.per_step, (step + 1) * self.per_step)))

    def at(self, place: int) -> Prompt:
        return Prompt(f"set:{place}", "a" * 1000, self.token_ids, "only", {})


class Now:
    """An answer that is there; implements roles.Running."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def ready(self) -> bool:
        return True

    def result(self) -> Any:
        return self.value

    def on_ready(self, call: Any) -> None:
        call()


class Idle:
    """Rewards, learner and publisher that cost the driver nothing."""

    def __init__(self) -> None:
        self.rewards = tuple(Reward(i / K, {"only": i / K}) for i in range(K))
        self.batches: list[RolloutBatch] = []
        self.first: Group | None = None

    def score(self, group: Group) -> Now:
        self.first = self.first or group
        return Now(self.rewards)

    def update(self, batch: RolloutBatch) -> Now:
        self.batches = [batch]
        return Now(UPDATE)

    def logprobs(self, sequences: Sequences) -> Floats:
        return np.zeros(sequences.num_completion_tokens, np.float32)

    def publish(self, policy_version: int) -> int:
        return 0


class OneByOne:
    """In the place of EngineSession's queue: the oldest drawing is done whenever somebody waits, so that
    each group comes alone."""

    def __init__(self) -> None:
        self.open: deque[tuple[Drawing, Group]] = deque()
        self.items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self.items.append(item)

    def empty(self) -> bool:
        return not self.items

    def get(self, timeout: float | None = None) -> Any:
        if not self.items:
            drawing, group = self.open.popleft()
            drawing.set_result(group)
        return self.items.popleft()


class PretendHandle:
    """Draws the same completions for each prompt, by each version."""

    def __init__(self, queue: OneByOne) -> None:
        self.queue = queue
        self.completions: dict[int, tuple[Completion, ...]] = {}
        self.draw = self

    def remote(self, ticket: Ticket, sampling: Sampling, policy_version: int) -> Drawing:
        if policy_version not in self.completions:
            self.completions[policy_version] = make_completions(policy_version)
        drawing = Drawing()
        group = Group(ticket.number, ticket.prompt, self.completions[policy_version])
        self.queue.open.append((drawing, group))
        return drawing


class PretendRollouts:
    """Implements what the loop asks of roles.Rollouts, by the pool's own EngineSession."""

    def __init__(self, engines: int) -> None:
        self.queue = OneByOne()
        handles: Any = [PretendHandle(self.queue)] * engines
        self.pool = RolloutPool(handles, timeout_s=60, restarts=0, tensor_parallel=1, max_num_seqs=ROOM)

    def open(self, sampling: Sampling) -> EngineSession:
        session = EngineSession(replace(self.pool.open(sampling).engines, give_up=lambda: None))
        session.events = self.queue  # type: ignore[assignment]
        return session

    def logprobs(self, sequences: Sequences) -> Floats:
        return np.zeros((1, sequences.num_completion_tokens), np.float32)


@dataclass(frozen=True)
class Load:
    """What a measurement draws."""

    prompts: int
    """A step."""
    steps: int
    """Measured; one comes before."""

    @property
    def completions(self) -> int:
        return self.prompts * K * self.steps

    def config(self) -> Config:
        lengths = Lengths(TOKENS, 0.1, 2 * TOKENS)
        speed = replace(Speed(), slots=ROOM)
        scenario = Scenario(1, 1, self.prompts, K, lengths, 0.0, speed=speed, staleness=STALENESS)
        return make_config(replace(scenario, warm_up=1, measured=self.steps))


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU and of the wall."""

    process_s: float
    thread_s: float
    """Of the loop's own thread."""
    wall_s: float

    @classmethod
    def now(cls) -> Cost:
        return cls(time.process_time(), time.thread_time(), time.perf_counter())

    def since(self, before: Cost, completions: int) -> dict[str, float]:
        process_s = self.process_s - before.process_s
        thread_s = self.thread_s - before.thread_s
        return {
            "us_per_completion": 1e6 * process_s / completions,
            "us_of_the_loops_thread": 1e6 * thread_s / completions,
            "us_of_other_threads": 1e6 * (process_s - thread_s) / completions,
            "wall_us_per_completion": 1e6 * (self.wall_s - before.wall_s) / completions,
        }


def run_loop(load: Load, rollouts: Any, idle: Idle) -> Iterator[None]:
    """One step after the other: the first, then those that are measured."""
    config = load.config()
    everybody: Any = idle
    prompts = RealPrompts(load.prompts)
    partners = Partners(prompts, rollouts, everybody, None, everybody, everybody)
    begun = Start(0, begin_steering(config.arms[0].objective))
    steps: Any = train_ahead(config, config.arms[0], partners, begun, lambda: None)
    try:
        for _ in range(1 + load.steps):
            next(steps)
            yield
    finally:
        steps.close()


def measure_loop(load: Load, rollouts: Any, idle: Idle) -> dict[str, float]:
    loop = run_loop(load, rollouts, idle)
    next(loop)
    before = Cost.now()
    for _ in range(load.steps):
        next(loop)
    cost = Cost.now().since(before, load.completions)
    loop.close()  # type: ignore[attr-defined]
    return cost


def profile_loop(load: Load, rollouts: Any, idle: Idle) -> list[dict[str, Any]]:
    """The functions of the loop's thread in which most time goes by; the profiler makes all of them
    slower."""
    loop = run_loop(load, rollouts, idle)
    next(loop)
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    for _ in range(load.steps):
        next(loop)
    profile.disable()
    loop.close()  # type: ignore[attr-defined]
    return list_functions(profile, load.completions)


def list_functions(profile: cProfile.Profile, completions: int, most: int = 25) -> list[dict[str, Any]]:
    """By their own time, and with what they call."""
    stats: Any = pstats.Stats(profile)
    rows = []
    for (file, line, name), (_, calls, own_s, whole_s, _) in stats.stats.items():
        place = f"{Path(file).parent.name}/{Path(file).name}:{line}" if line else file
        own, whole = 1e6 * own_s / completions, 1e6 * whole_s / completions
        rows.append({"function": f"{place} {name}", "calls": calls, "own_us": own, "whole_us": whole})
    return sorted(rows, key=lambda row: -row["own_us"])[:most]


def measure_bytes(load: Load, idle: Idle) -> dict[str, int]:
    """What passes the driver in a step, as pickled: once from the engines, and as often on as somebody is
    asked."""
    group, (batch,) = idle.first, idle.batches
    assert group is not None
    ticket = Ticket(0, group.prompt, 0)
    return {
        "to_engines": load.prompts * count_bytes(ticket),
        "from_engines": load.prompts * count_bytes(group),
        "to_rewards": load.prompts * count_bytes(group),
        "to_reference": load.prompts * count_bytes(group),
        "to_learners": count_bytes(batch),
    }


def count_bytes(value: object) -> int:
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return len(text) + sum(buffer.raw().nbytes for buffer in buffers)


def measure_alone(quick: bool) -> dict[str, Any]:
    """The driver's logic without Ray."""
    load = Load(prompts=64, steps=2) if quick else Load(prompts=512, steps=6)
    rows = []
    for engines in (16, 64) if quick else (16, 64, 256, 1024):
        idle = Idle()
        rows.append({"engines": engines, **measure_loop(load, PretendRollouts(engines), idle)})
    return {
        "completions": load.completions,
        "tokens_per_completion": TOKENS,
        "threads": threading.active_count(),
        "by_engines": rows,
        "bytes_per_step": {"completions": load.prompts * K, **measure_bytes(load, idle)},
        "profile": profile_loop(load, PretendRollouts(64), Idle()),
    }
