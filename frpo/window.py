"""What the loop draws when it runs ahead of the learner (`rollout.staleness`): which prompts, when, and which
of them a step trains on. Pure: no clock, no actor.

Prompts are numbered in the order in which a run takes them; a step trains on `size` of them. Each number is

    waiting -> drawing -> drawn -> trained
       ^----------'
     lost with its engine

A group is as old as its first token, which the version published last drew when it began, or a newer one.
With v the version published last, which is also the number of steps done, and n the staleness allowed:

- fewer than (v + n + 1) size numbers have begun;
- the step from version v takes the `size` oldest groups that are drawn, once what it leaves can be trained in
  time: of those that began under version w or an older one it leaves at most (w + n - v) size, the groups of
  the steps that may still take them. Nothing, of those that began under v - n.

So no group is ever too old, and nothing that was drawn is thrown away. The second rule can always be met: it
held one step ago, and at most `size` of those that a step must take are then still there. A step waits only
for completions that nearly n updates have gone by; others that take long go into the steps after it. To wait
for those, rather than drop them, keeps long completions in the data.

Example: size 2, staleness 1.

    version 0   0 1 2 3 begin; 3, 0 and 2 are drawn. The step takes 0 and 2, the lowest numbers of one age.
    version 1   4 and 5 begin, and 5 is drawn. 3 is there since long; 1 began under version 0: the step waits
                for it, and takes 1 and 3.
    version 2   6 and 7 begin. 4 and 5 began under version 1: the step waits for 4.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from frpo.types import Flight, Group


class Window:
    """`step`: how many were done before; `flight` as that one left it, None where nothing has begun."""

    def __init__(
        self, size: int, staleness: int, num_steps: int, *, step: int = 0, flight: Flight | None = None
    ) -> None:
        self.size, self.staleness, self.last = size, staleness, num_steps * size
        self.version = step
        flight = flight or Flight(step * size, (), ())
        self.begun = flight.begun
        self.waiting = sorted(flight.waiting)
        """A heap."""
        self.drawing: dict[int, int] = {}
        """Version under which each began."""
        self.drawn = {group.index: group.policy_version for group in flight.groups}
        """Version that drew the first token of each."""
        self.num_drawing: Counter[int] = Counter()
        self.num_drawn = Counter(self.drawn.values())
        """By version."""

    def flight(self, groups: Iterable[Group]) -> Flight:
        """`groups`: all that are drawn. What is being drawn now is to be drawn again."""
        return Flight(self.begun, tuple(sorted([*self.waiting, *self.drawing])), tuple(groups))

    def begin_next(self) -> int | None:
        """The number to draw now; None while nothing may begin. Those that were lost come first."""
        if self.waiting:
            number = heapq.heappop(self.waiting)
        elif self.begun < min(self.last, (self.version + self.staleness + 1) * self.size):
            number = self.begun
            self.begun += 1
        else:
            return None
        self.drawing[number] = self.version
        self.num_drawing[self.version] += 1
        return number

    def arrive(self, number: int, version: int) -> None:
        """Its group is drawn, its first token by `version`."""
        self.num_drawing[self.drawing.pop(number)] -= 1
        self.drawn[number] = version
        self.num_drawn[version] += 1

    def lose(self, number: int) -> None:
        self.num_drawing[self.drawing.pop(number)] -= 1
        heapq.heappush(self.waiting, number)

    @property
    def ready(self) -> bool:
        """Whether the next step can be taken."""
        if len(self.drawn) < self.size:
            return False
        drawing = drawn = 0
        for version in sorted(self.num_drawing.keys() | self.num_drawn.keys()):
            drawing += self.num_drawing[version]
            drawn += self.num_drawn[version]
            left = drawing + drawn - min(self.size, drawn)
            if left > (version + self.staleness - self.version) * self.size:
                return False
        return True

    def take(self) -> list[int]:
        """The numbers that it trains on."""
        oldest = sorted(self.drawn, key=lambda number: (self.drawn[number], number))[: self.size]
        for number in oldest:
            self.num_drawn[self.drawn.pop(number)] -= 1
        return oldest

    def publish(self, version: int) -> None:
        """The engines run it."""
        self.version = version
        self.num_drawing, self.num_drawn = +self.num_drawing, +self.num_drawn
