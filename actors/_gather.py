"""Log-probs of groups by several workers, at once or later than they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from actors._calls import Actors
from frpo.roles import Pending
from frpo.types import Floats, Group

Logprobs = tuple[Floats, ...]
"""k arrays [T] of a group, nats."""
Block = list[Group]
"""Groups that are scored together; see `batching.blocks_of`."""


def deal(actors: Actors, method: str, *args: Any, blocks: Sequence[Block], first: int = 0) -> Dealt:
    """Call `method(*args, blocks)` on as many workers as there are blocks for, from worker `first` on."""
    hands = min(len(actors), len(blocks))
    calls = [
        actors.call((first + i) % len(actors), method, *args, list(blocks[i::hands])) for i in range(hands)
    ]
    return Dealt(calls, len(blocks))


class Dealt:
    """The answers for blocks that were dealt out like cards: block i to worker i modulo their number.
    Implements roles.Pending."""

    def __init__(self, calls: Sequence[Pending[list[list[Logprobs]]]], num_blocks: int) -> None:
        self.calls, self.num_blocks = calls, num_blocks
        self.found: list[Logprobs] | None = None

    def ready(self) -> bool:
        return all(call.ready() for call in self.calls)

    def result(self) -> list[Logprobs]:
        """Of each group, in the order of the blocks."""
        if self.found is None:
            hands = [call.result() for call in self.calls]
            self.found = [
                group for i in range(self.num_blocks) for group in hands[i % len(hands)][i // len(hands)]
            ]
        return self.found


class Gathered:
    """Groups that are asked for together by `ask`: when somebody wants the first answer, or `ask_all` is
    called."""

    def __init__(self, ask: Callable[[list[Group]], Pending[list[Logprobs]]]) -> None:
        self.ask = ask
        self.waiting: list[Later] = []

    def later(self, group: Group) -> Later:
        self.waiting.append(Later(self, group, len(self.waiting)))
        return self.waiting[-1]

    def ask_all(self) -> None:
        answers = self.ask([later.group for later in self.waiting])
        for later in self.waiting:
            later.answers = answers
        self.waiting = []


class Later:
    """The answer for one of them; implements roles.Pending."""

    def __init__(self, gathered: Gathered, group: Group, index: int) -> None:
        self.gathered, self.group, self.index = gathered, group, index
        self.answers: Pending[list[Logprobs]] | None = None

    def ready(self) -> bool:
        return self.answers is not None and self.answers.ready()

    def result(self) -> Logprobs:
        if self.answers is None:
            self.gathered.ask_all()
        assert self.answers is not None
        return self.answers.result()[self.index]
