"""Log-probs of groups by several workers, at once or later than they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from frpo.actors._blocks import Block, Logprobs
from frpo.roles import Pending
from frpo.types import Group

BlockScores = list[list[Logprobs]]
"""Of a worker: its blocks, and of each its groups."""


def deal_out(
    blocks: Sequence[Block],
    num_workers: int,
    ask: Callable[[int, list[Block]], Pending[BlockScores]],
    first: int = 0,
) -> Dealt:
    """`ask` as many workers as there are blocks for, by their numbers, from worker `first` on."""
    hands = min(num_workers, len(blocks))
    calls = [ask((first + i) % num_workers, list(blocks[i::hands])) for i in range(hands)]
    return Dealt(calls, len(blocks))


class Dealt:
    """The answers for blocks that were dealt out like cards: block i to worker i modulo their number.
    Implements roles.Pending."""

    def __init__(self, calls: Sequence[Pending[BlockScores]], num_blocks: int) -> None:
        self.calls, self.num_blocks = calls, num_blocks
        self.answer: list[Logprobs] | None = None

    def ready(self) -> bool:
        return all(call.ready() for call in self.calls)

    def result(self) -> list[Logprobs]:
        """Of each group, in the order of the blocks."""
        if self.answer is None:
            hands = [call.result() for call in self.calls]
            self.answer = []
            for i in range(self.num_blocks):
                self.answer += hands[i % len(hands)][i // len(hands)]
        return self.answer


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
