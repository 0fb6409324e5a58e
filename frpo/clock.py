"""Seconds of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from frpo.types import Phases

Phase = Literal["generate", "score", "update", "publish"]


class Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.seconds: dict[Phase, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def phases(self, waiting_rewards: int, waiting_reference: int) -> Phases:
        """When all four have ended."""
        return Phases(
            generate_s=self.seconds["generate"],
            score_s=self.seconds["score"],
            waiting_rewards=waiting_rewards,
            waiting_reference=waiting_reference,
            update_s=self.seconds["update"],
            publish_s=self.seconds["publish"],
            step_s=time.perf_counter() - self.began,
            driver_s=time.process_time() - self.cpu_began,
        )
