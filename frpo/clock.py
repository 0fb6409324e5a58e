"""When the steps of a loop did what, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from frpo.stats import Phases, Times
from frpo.types import Arrival

Phase = Literal["generate", "score", "update", "publish"]
Span = tuple[float, float]
"""From, to: seconds."""


class Clock:
    """Of one loop: runs from when it is made."""

    def __init__(self) -> None:
        self.loop_began = time.perf_counter()
        self.begin_step()

    def begin_step(self) -> None:
        self.began = time.perf_counter()
        self.cpu_began = time.process_time()
        self.spans: dict[Phase, Span] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spans[name] = began, time.perf_counter()

    def phases(self, waiting_rewards: int, waiting_reference: int) -> Phases:
        """Of the step, when all four have ended."""
        seconds = {name: ended - began for name, (began, ended) in self.spans.items()}
        return Phases(
            generate_s=seconds["generate"],
            score_s=seconds["score"],
            waiting_rewards=waiting_rewards,
            waiting_reference=waiting_reference,
            update_s=seconds["update"],
            publish_s=seconds["publish"],
            step_s=time.perf_counter() - self.began,
            driver_s=time.process_time() - self.cpu_began,
        )

    def times(self, groups: Sequence[Arrival]) -> Times:
        """Of the step, when all four have ended; `groups` are those that it trains on."""
        began = {name: self.seconds_at(span[0]) for name, span in self.spans.items()}
        drawn = [(self.seconds_at(group.began), self.seconds_at(group.ended)) for group in groups]
        return Times(
            generate_at=began["generate"],
            score_at=began["score"],
            update_at=began["update"],
            publish_at=began["publish"],
            drawn=merge_spans(drawn),
            groups_ahead=sum(group.ended <= self.began for group in groups),
        )

    def seconds_at(self, moment: float) -> float:
        """Since the loop began; 0 for what was before."""
        return max(0.0, moment - self.loop_began)


def merge_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """What they cover together, in order. Example: (4, 5), (0, 2), (1, 3) give (0, 3), (4, 5)."""
    merged: list[Span] = []
    for began, ended in sorted(spans):
        if merged and began <= merged[-1][1]:
            first, last = merged.pop()
            merged.append((first, max(last, ended)))
        else:
            merged.append((began, ended))
    return tuple(merged)
