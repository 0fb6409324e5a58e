"""Virtual time: events in order of their seconds, and waits that run them instead of sleeping."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any, Generic, TypeVar

from frpo import clock

T = TypeVar("T")


class Timeline:
    """`now`: seconds since it was made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        """A heap; those of one moment in the order in which they were asked for."""
        self.numbers = itertools.count()

    def call_at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), call))

    def run_next(self) -> None:
        """The next event. Raises RuntimeError where nothing will ever happen."""
        if not self.events:
            raise RuntimeError(f"at {self.now:.1f} s somebody waits, and nothing is going to happen")
        self.now, _, call = heapq.heappop(self.events)
        call()

    def run_until(self, is_met: Callable[[], bool]) -> None:
        while not is_met():
            self.run_next()


class VirtualTime:
    """What `frpo.clock` asks of the module `time`."""

    process_time = staticmethod(time.process_time)

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline

    def perf_counter(self) -> float:
        return self.timeline.now


@contextmanager
def keep_time(timeline: Timeline) -> Iterator[None]:
    """The driver's `Clock` reads the timeline meanwhile."""
    module: Any = clock
    real = module.time
    module.time = VirtualTime(timeline)
    try:
        yield
    finally:
        module.time = real


class Mailbox(Generic[T]):
    """A queue.SimpleQueue whose `get` lets virtual time pass."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.items: deque[T] = deque()

    def put(self, item: T) -> None:
        self.items.append(item)

    def empty(self) -> bool:
        return not self.items

    def get(self, timeout: float | None = None) -> T:
        limit = float("inf") if timeout is None else self.timeline.now + timeout
        while not self.items:
            if self.timeline.events and self.timeline.events[0][0] > limit:
                self.timeline.now = limit
                raise Empty
            self.timeline.run_next()
        return self.items.popleft()


class Later(Generic[T]):
    """An answer that is there at some moment; implements roles.Running."""

    def __init__(self, timeline: Timeline, when: float, value: T) -> None:
        self.timeline, self.when, self.value = timeline, when, value
        timeline.call_at(when, lambda: None)  # so that time stops there for those who wait

    def ready(self) -> bool:
        return self.timeline.now >= self.when

    def result(self) -> T:
        self.timeline.run_until(self.ready)
        return self.value

    def on_ready(self, call: Callable[[], None]) -> None:
        self.timeline.call_at(max(self.when, self.timeline.now), call)
