"""Groups that are drawn one by one by whichever engine is free, while the driver does something else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ray import ObjectRef
from ray.exceptions import ActorDiedError, RayTaskError

from frpo.actors._calls import (
    GONE,
    RESTART_LIMIT_S,
    Actors,
    StartedAnew,
    failure_of,
    logger,
    tell_death,
    wait_until_back,
)
from frpo.actors._slots import Slots
from frpo.roles import Running, WorkerFailed
from frpo.types import Arrival, Arrivals, Group, Ticket


class StaleWeights(StartedAnew):
    """The worker does not run the policy version that it was asked to draw from (it was restarted)."""


@dataclass(frozen=True)
class Engines:
    """What is asked of the rollout workers."""

    actors: Actors[Any]
    draw: Callable[[int, Ticket, int], ObjectRef[Group]]
    """Of a worker, a ticket and the version published last."""
    give_up: Callable[[], object]
    restore: Callable[[int, bool], bool]
    """Give a worker that was restarted the current weights; False where it can have none now. The second says
    whether the learner is idle."""
    num_published: Callable[[], int]
    """How often that was done."""
    room: int
    """Groups that one of them has use for at once."""


@dataclass(frozen=True)
class Ended:
    """A ticket's call has come to its end."""

    worker: int
    number: int
    answer: Future[Group]
    life: int
    """Of the worker, in which the ticket was given to it."""
    began: float
    """As `ended`, by time.perf_counter."""
    ended: float


@dataclass(frozen=True)
class Back:
    """A worker that was killed answers again, or does not."""

    worker: int
    error: WorkerFailed | None


class EngineSession:
    """Implements roles.DrawSession. Nothing is polled: each call of an engine says by itself when it has
    ended, so the driver's work for a group is the same however many engines there are.

    A worker that dies loses its tickets. It is waited for beside the others, and given the current weights
    before it is asked again.
    """

    def __init__(self, engines: Engines) -> None:
        self.engines, self.actors = engines, engines.actors
        self.slots = Slots(len(self.actors), engines.room)
        self.drawing: dict[int, int] = {}
        """Worker by number of the ticket."""
        self.away: dict[int, int] = {}
        """Workers that were killed, and how often weights had been published then: with the next they have
        some."""
        self.lives = [0] * len(self.actors)
        """How often each has been sent away."""
        self.bare: set[int] = set()
        """Of those, who is back without weights."""
        self.events: SimpleQueue[Ended | Back | None] = SimpleQueue()
        self.watched: object = None

    @property
    def room(self) -> int:
        for worker in list(self.bare):
            if self._has_weights(worker):
                self._admit(worker)
        return len(self.slots)

    def begin(self, ticket: Ticket, policy_version: int) -> None:
        worker = self.slots.take()
        self.drawing[ticket.number] = worker
        answer: Any = self.engines.draw(worker, ticket, policy_version).future()  # type: ignore[attr-defined]
        life, began = self.lives[worker], time.perf_counter()

        def tell(answer: Future[Group]) -> None:
            self.events.put(Ended(worker, ticket.number, answer, life, began, time.perf_counter()))

        answer.add_done_callback(tell)

    def wait(self, until: Running[object] | None = None) -> Arrivals:
        if until is not None and until is not self.watched:
            self.watched = until
            until.on_ready(lambda: self.events.put(None))
        arrived, lost = list[Arrival](), list[int]()
        for event in self._next_events(until):
            if isinstance(event, Back):
                self._welcome(event, idle=until is None)
            else:
                del self.drawing[event.number]
                group = self._group_of(event)
                if group is None:
                    lost.append(event.number)
                else:
                    arrived.append(Arrival(group, event.began, event.ended))
        return Arrivals(tuple(arrived), tuple(lost))

    def _next_events(self, until: Running[object] | None) -> Iterator[Ended | Back]:
        """All that have come, and one at least, unless `until` is ready."""
        limit = self.actors.timeout_s
        if self.away.keys() - self.bare:  # who is waited for says so when it is back, or is late
            limit = max(limit, 2 * RESTART_LIMIT_S)
        try:
            events = [self.events.get(timeout=limit)]
        except Empty:
            if until is not None and not self.drawing:
                until.result()  # names whom it is waited for
                return
            names = ", ".join(sorted({self.actors.name(worker) for worker in self.drawing.values()}))
            raise WorkerFailed(f"{names or 'the engines'} finished no group within {limit:g} s.") from None
        while not self.events.empty():
            events.append(self.events.get())
        for event in events:
            if event is not None:
                yield event

    def _group_of(self, ended: Ended) -> Group | None:
        """None where the worker is not what it was. Raises WorkerFailed."""
        worker, name = ended.worker, self.actors.name(ended.worker)
        try:
            group = ended.answer.result()
        except ActorDiedError as error:
            raise WorkerFailed(tell_death(name, "draw", error)) from None
        except GONE:
            self._send_away(worker)
            return None
        except RayTaskError as error:
            if not isinstance(error.cause, StaleWeights):
                raise failure_of(name, "draw", error) from None
            self._send_away(worker)
            return None
        if ended.life == self.lives[worker]:  # else it was given all of its room again
            self.slots.give_back(worker)
        return group

    def _send_away(self, worker: int) -> None:
        """Until Ray has restarted it."""
        if worker in self.away:
            return
        self.away[worker] = self.engines.num_published()
        self.lives[worker] += 1
        logger.warning("%s was killed; its prompts are drawn again", self.actors.name(worker))
        self.slots.remove(worker)

        def wait() -> None:
            error = None
            try:
                wait_until_back(self.actors.name(worker), self.actors.handles[worker])
            except WorkerFailed as late:
                error = late
            self.events.put(Back(worker, error))

        threading.Thread(target=wait, daemon=True).start()

    def _welcome(self, back: Back, *, idle: bool) -> None:
        """`idle`: the learner is. The next step, and with it the next publish, might wait for this worker."""
        if back.error:
            raise back.error
        if self._has_weights(back.worker) or self.engines.restore(back.worker, idle):
            self._admit(back.worker)
        else:
            self.bare.add(back.worker)

    def _has_weights(self, worker: int) -> bool:
        """A publish waits for every engine."""
        return self.engines.num_published() > self.away[worker]

    def _admit(self, worker: int) -> None:
        del self.away[worker]
        self.bare.discard(worker)
        self.slots.add(worker)

    def close(self) -> None:
        if self.drawing:
            self.engines.give_up()
