"""Engines behind the real session of drawing, on virtual time, and weights on their way to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from frpo.actors._drawing import EngineSession
from frpo.actors.rollout import RolloutPool
from frpo.types import Floats, Group, Prompt, Sampling, Sequences, Ticket

from .engines import Engine, Request, Span
from .partners import Cards, Ledger
from .timeline import Later, Mailbox, Timeline


class EngineHandle:
    """What `RolloutPool` calls of an actor: its answer is a Future by way of Ray's `ObjectRef.future`."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self.engine, self.ledger = engine, ledger
        self.draw = self

    def remote(self, ticket: Ticket, sampling: Sampling, policy_version: int) -> Drawing:
        drawing = Drawing()

        def finish(spans: list[list[Span]]) -> None:
            drawing.set_result(self.ledger.make_group(ticket.number, ticket.prompt, spans))

        self.engine.submit(Request(self.ledger.lengths[ticket.number].tolist(), finish))
        return drawing


class Drawing:
    """A concurrent.futures.Future of one thread, without its locks, and the reference that gives it."""

    def __init__(self) -> None:
        self.value: Any = None
        self.told: Any = None

    def future(self) -> Drawing:
        return self

    def add_done_callback(self, told: Any) -> None:
        self.told = told

    def set_result(self, value: Group) -> None:
        self.value = value
        self.told(self)

    def result(self) -> Group:
        group: Group = self.value
        return group


class SimulatedRollouts:
    """Engines behind the real `RolloutPool.open` and `EngineSession`; `generate` deals prompts out as the
    pool's own. `room` times max_num_seqs is what an engine has in hand; None: what the pool gives it."""

    def __init__(
        self,
        timeline: Timeline,
        engines: Sequence[Engine],
        ledger: Ledger,
        room: float | None,
    ) -> None:
        self.timeline, self.engines, self.ledger = timeline, engines, ledger
        self.room = room
        handles: Any = [EngineHandle(engine, ledger) for engine in engines]
        slots = engines[0].speed.slots
        self.pool = RolloutPool(handles, timeout_s=1e9, restarts=0, tensor_parallel=1, max_num_seqs=slots)
        self.drained_s: list[tuple[float, float]] = []
        """Of each `generate`: when its first engine had nothing left to draw, and when the last."""

    def open(self, sampling: Sampling) -> EngineSession:
        engines = replace(self.pool.open(sampling).engines, give_up=lambda: None)
        if self.room is not None:
            slots = self.engines[0].speed.slots
            engines = replace(engines, room=math.ceil(self.room * slots / sampling.num_completions))
        session = EngineSession(engines)
        session.events = Mailbox(self.timeline)  # type: ignore[assignment]
        return session

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
    ) -> Iterator[Group]:
        arrived: Mailbox[tuple[int, Group]] = Mailbox(self.timeline)
        numbers = [int(prompt.id) for prompt in prompts]
        left = [len(range(worker, len(prompts), len(self.engines))) for worker in range(len(self.engines))]
        for at, number in enumerate(numbers):
            worker = at % len(self.engines)
            self._ask(worker, number, prompts[at], arrived)
        first_s = None
        for _ in numbers:
            worker, group = arrived.get()
            left[worker] -= 1
            if not left[worker] and first_s is None:
                first_s = self.timeline.now
            yield group
        assert first_s is not None
        self.drained_s.append((first_s, self.timeline.now))

    def _ask(self, worker: int, number: int, prompt: Prompt, arrived: Mailbox[tuple[int, Group]]) -> None:
        def finish(spans: list[list[Span]]) -> None:
            arrived.put((worker, self.ledger.make_group(number, prompt, spans)))

        self.engines[worker].submit(Request(self.ledger.lengths[number].tolist(), finish))

    def logprobs(self, sequences: Sequences) -> Floats:
        return np.zeros((1, sequences.num_completion_tokens), np.float32)


@dataclass
class SimulatedPublisher:
    """`send_s` on the learner's cards, then `load_s` in which an engine draws nothing; returns when all
    have it."""

    rollouts: SimulatedRollouts
    cards: Cards
    send_s: float
    load_s: float
    in_flight: bool
    comes_first: bool = False
    """Sent before whatever else waits for the cards: not what a learner rank does."""

    def publish(self, policy_version: int) -> int:
        timeline = self.cards.timeline
        take = self.cards.slip_in if self.comes_first else self.cards.take
        Later(timeline, take(self.send_s), None).result()
        left = count(len(self.rollouts.engines) - 1, -1)
        is_last: list[bool] = []

        def count_down() -> None:
            if next(left) == 0:
                is_last.append(True)

        for engine in self.rollouts.engines:
            engine.load(policy_version, self.load_s, in_flight=self.in_flight, on_done=count_down)
        timeline.run_until(lambda: bool(is_last))
        return 0
