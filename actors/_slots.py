"""Room that workers have, and who gets what comes next."""

from __future__ import annotations

import heapq

MOST_ENTRIES = 4
"""Of a worker in the heap, one of which counts."""


class Slots:
    """The worker with the most room left comes first; of equals, the one with the lowest number.

    By turns instead, some engines have a queue while others run dry: with 64 simulated ones, one step ahead,
    85 % of their time was in use, and 93 % this way (docs/results/scale.json).
    """

    def __init__(self, num_workers: int, room: int) -> None:
        self.room = room
        self.free = dict.fromkeys(range(num_workers), room)
        self.total = num_workers * room
        self.heap = [(-room, worker) for worker in range(num_workers)]
        """Also entries of before, until they are many: one counts where it says what is free now."""

    def __len__(self) -> int:
        return self.total

    def take(self) -> int:
        """Raises IndexError where there is none."""
        while True:
            free, worker = heapq.heappop(self.heap)
            if self.free.get(worker) == -free > 0:
                self._change(worker, -1)
                return worker

    def give_back(self, worker: int) -> None:
        """What was taken; of one that was removed it is gone."""
        if worker in self.free:
            self._change(worker, 1)

    def remove(self, worker: int) -> None:
        self.total -= self.free.pop(worker)

    def add(self, worker: int) -> None:
        """All of its room, again."""
        self.free[worker] = 0
        self._change(worker, self.room)

    def _change(self, worker: int, by: int) -> None:
        self.free[worker] += by
        self.total += by
        heapq.heappush(self.heap, (-self.free[worker], worker))
        if len(self.heap) > MOST_ENTRIES * len(self.free):
            self.heap = [(-free, worker) for worker, free in self.free.items()]
            heapq.heapify(self.heap)
