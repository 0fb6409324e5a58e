"""An engine that decodes with continuous batching, on virtual time: an event for each completion, none for
each token."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .timeline import Timeline

ROUNDING = 1e-6
"""Tokens; what sums of seconds are off by."""


@dataclass(frozen=True)
class Speed:
    """A decode step of `b` sequences takes `step_s + sequence_s * b` seconds and gives each a token."""

    slots: int = 256
    """max_num_seqs: sequences decoded at once; the others wait for a place."""
    step_s: float = 8.5e-3
    sequence_s: float = 35e-6

    def step_of(self, sequences: int) -> float:
        """Seconds."""
        return self.step_s + self.sequence_s * sequences

    @property
    def tokens_per_s(self) -> float:
        """With all places taken."""
        return self.slots / self.step_of(self.slots)

    def at_rate(self, tokens_per_s: float) -> Speed:
        """The same curve, faster or slower throughout, with this rate where all places are taken."""
        factor = self.tokens_per_s / tokens_per_s
        return Speed(self.slots, self.step_s * factor, self.sequence_s * factor)


@dataclass(frozen=True)
class Span:
    """Tokens that one version drew."""

    version: int
    tokens: float


@dataclass
class Request:
    """The completions of one prompt."""

    lengths: Sequence[int]
    """Tokens of each."""
    on_done: Callable[[list[list[Span]]], None]
    """Called with the spans of each completion when all are there."""
    spans: list[list[Span]] = field(init=False)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.spans = [[] for _ in self.lengths]
        self.missing = len(self.lengths)


@dataclass(frozen=True)
class Meter:
    """What an engine has done so far."""

    any_s: float = 0.0
    """Seconds in which it decoded."""
    full_s: float = 0.0
    """Seconds in which all places were taken."""
    place_s: float = 0.0
    """Seconds times places taken."""
    tokens: float = 0.0

    def __sub__(self, other: Meter) -> Meter:
        return Meter(
            self.any_s - other.any_s,
            self.full_s - other.full_s,
            self.place_s - other.place_s,
            self.tokens - other.tokens,
        )


class Engine:
    """Sequences are decoded in the order in which they came, as many at once as there are places.

    `progress` counts the steps it has made: each sequence that is decoded has one token for each since it
    began. A sequence that comes between two steps begins at once, so steps are not whole numbers; what
    that changes is less than a step for a completion. Prompts cost nothing.
    """

    def __init__(self, timeline: Timeline, speed: Speed) -> None:
        self.timeline, self.speed = timeline, speed
        self.progress = 0.0
        self.looked_at = timeline.now
        self.running: list[tuple[float, int, float, Request, int]] = []
        """A heap: progress at the end, number of the sequence, progress at its beginning, request,
        completion."""
        self.waiting: deque[tuple[Request, int]] = deque()
        self.held: list[Request] = []
        """Asked for while weights are being taken in."""
        self.versions: list[tuple[float, int]] = []
        """Progress from which each version drew."""
        self.num_sequences = 0
        self.plan = 0
        """Events that were planned before are void."""
        self.is_loading = self.is_draining = False
        self.when_drained: Callable[[], None] | None = None
        self.done = Meter()

    def submit(self, request: Request) -> None:
        if self.is_draining:
            self.held.append(request)
            return
        self._catch_up()
        self._queue(request)
        self._go_on()

    def _queue(self, request: Request) -> None:
        self.waiting.extend((request, i) for i in range(len(request.lengths)))

    def load(self, version: int, seconds: float, *, in_flight: bool, on_done: Callable[[], None]) -> None:
        """Take in weights, which takes `seconds`: between two tokens, or after all that was asked for."""
        self._catch_up()
        self.is_draining = True

        def begin() -> None:
            self._catch_up()
            self.is_loading = True
            self.timeline.call_at(self.timeline.now + seconds, end)

        def end() -> None:
            self.looked_at = self.timeline.now  # nothing was drawn meanwhile
            self.is_loading = self.is_draining = False
            self.versions.append((self.progress, version))
            for request in self.held:
                self._queue(request)
            self.held.clear()
            self._go_on()
            on_done()

        if in_flight or not (self.running or self.waiting):
            begin()
        else:
            self.when_drained = begin

    def read_meter(self) -> Meter:
        self._catch_up()
        return self.done

    def _catch_up(self) -> None:
        """Decode up to now."""
        seconds = self.timeline.now - self.looked_at
        self.looked_at = self.timeline.now
        sequences = len(self.running)
        if not sequences or self.is_loading or seconds <= 0:
            return
        steps = seconds / self.speed.step_of(sequences)
        self.progress += steps
        full_s = seconds if sequences == self.speed.slots else 0.0
        done = self.done
        self.done = Meter(
            done.any_s + seconds,
            done.full_s + full_s,
            done.place_s + seconds * sequences,
            done.tokens + steps * sequences,
        )

    def _go_on(self) -> None:
        """Give places to those who wait, and plan the next end of a sequence."""
        while self.waiting and len(self.running) < self.speed.slots:
            request, i = self.waiting.popleft()
            self.num_sequences += 1
            end = self.progress + request.lengths[i]
            heapq.heappush(self.running, (end, self.num_sequences, self.progress, request, i))
        self.plan += 1
        if self.running and not self.is_loading:
            plan = self.plan
            steps = max(0.0, self.running[0][0] - self.progress)
            seconds = steps * self.speed.step_of(len(self.running))
            self.timeline.call_at(self.timeline.now + seconds, lambda: self._end_sequences(plan))

    def _end_sequences(self, plan: int) -> None:
        if plan != self.plan:
            return
        self._catch_up()
        done = []
        while self.running and self.running[0][0] <= self.progress + ROUNDING:
            end, _, begun, request, i = heapq.heappop(self.running)
            request.spans[i] = self._spans_between(begun, end)
            request.missing -= 1
            if not request.missing:
                done.append(request)
        self._go_on()
        for request in done:
            request.on_done(request.spans)
        if self.when_drained and not self.running and not self.waiting:
            begin, self.when_drained = self.when_drained, None
            begin()

    def _spans_between(self, begun: float, end: float) -> list[Span]:
        """The newest version last."""
        spans = []
        for since, version in reversed(self.versions):
            if since < end:
                spans.append(Span(version, end - max(since, begun)))
                end = max(since, begun)
            if since <= begun:
                break
        return spans[::-1]
