"""The partners of the real loops, on virtual time. A completion is one token that stands for all of it:
its id is the number of the completion, and `Ledger` knows its length and the versions that drew it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frpo.roles import Pending
from frpo.stats import UpdateStats
from frpo.types import Completion, Floats, Group, Prompt, Reward, RolloutBatch, Sequences

from .engines import Span
from .timeline import Later, Timeline

ZERO: Floats = np.zeros(1, np.float32)
TOKEN = np.zeros(1, np.int32)
UPDATE = UpdateStats(
    loss=0.0,
    penalty=0.0,
    grad_norm=0.0,
    learning_rate=0.0,
    entropy=0.0,
    clip_share=0.0,
    capped_share=0.0,
    mismatch_kl=None,
    stale_kl=None,
    kl=None,
    num_computed_tokens=0,
    learner_s=0.0,
)


class Ledger:
    """Lengths of all completions `[prompts, k]`, tokens, and what drew them."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths
        self.versions = np.zeros(lengths.shape)
        """Mean version over the tokens of each that is drawn."""
        self.oldest = np.zeros(lengths.shape, np.int64)

    def tokens_of(self, group: Group) -> int:
        return int(self.lengths[group.index].sum())

    def make_group(self, number: int, prompt: Prompt, spans: Sequence[Sequence[Span]]) -> Group:
        completions = []
        for i, (own, length) in enumerate(zip(spans, self.lengths[number], strict=True)):
            total = sum(span.version * span.tokens for span in own)
            self.versions[number, i] = total / length
            self.oldest[number, i] = own[0].version
            token = np.array([number * len(spans) + i], np.int32)
            versions = np.array([own[0].version], np.int32)
            completions.append(Completion(token, ZERO, versions, "", "stop"))
        return Group(number, prompt, tuple(completions))


class SamePrompts:
    def __init__(self, per_step: int) -> None:
        self.per_step = per_step

    def take(self, step: int) -> tuple[Prompt, ...]:
        return tuple(map(self.at, range(step * self.per_step, (step + 1) * self.per_step)))

    def at(self, place: int) -> Prompt:
        return Prompt(str(place), "", TOKEN, "only", {})


class RewardsLater:
    """Each group's are there `seconds` after it was drawn."""

    def __init__(self, timeline: Timeline, seconds: float) -> None:
        self.timeline, self.seconds = timeline, seconds

    def score(self, group: Group) -> Pending[tuple[Reward, ...]]:
        values = (int(c.token_ids[0]) * 7919 % 101 / 100 for c in group.completions)
        rewards = tuple(Reward(value, {"only": value}) for value in values)
        return Later(self.timeline, self.timeline.now + self.seconds, rewards)


class Cards:
    """GPUs that share each piece of work, one piece after the other."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.free_at = 0.0
        self.asked_s = 0.0

    def take(self, seconds: float) -> float:
        """When a piece that takes `seconds` ends."""
        self.free_at = max(self.free_at, self.timeline.now) + seconds
        self.asked_s += seconds
        return self.free_at

    def worked_s(self) -> float:
        """Seconds of work that are done."""
        return self.asked_s - max(0.0, self.free_at - self.timeline.now)

    def slip_in(self, seconds: float) -> float:
        """When it ends if nothing that waits comes before it: pieces of work are short beside `seconds`."""
        self.take(seconds)
        return self.timeline.now + seconds


class CardReference:
    """A reference on `cards`, `token_s` seconds a token; `waits`: until the first answer is wanted, since
    the cards are the engines' too."""

    def __init__(self, cards: Cards, ledger: Ledger, token_s: float, waits: bool) -> None:
        self.cards, self.ledger, self.token_s, self.waits = cards, ledger, token_s, waits
        self.asked: list[CardScores] = []

    def use(self, policy: Path, temperature: float) -> None: ...

    def score(self, group: Group) -> Pending[tuple[Floats, ...]]:
        self.asked.append(CardScores(self, group))
        scores = self.asked[-1]
        if not self.waits:
            self.begin()
        return scores

    def begin(self) -> None:
        """All that was asked for."""
        for scores in self.asked:
            seconds = self.ledger.tokens_of(scores.group) * self.token_s
            value = (ZERO,) * len(scores.group.completions)
            scores.answer = Later(self.cards.timeline, self.cards.take(seconds), value)
        self.asked.clear()


class CardScores:
    """Implements roles.Pending."""

    def __init__(self, reference: CardReference, group: Group) -> None:
        self.reference, self.group = reference, group
        self.answer: Later[tuple[Floats, ...]] | None = None

    def ready(self) -> bool:
        return self.answer is not None and self.answer.ready()

    def result(self) -> tuple[Floats, ...]:
        if self.answer is None:
            self.reference.begin()
        assert self.answer is not None
        return self.answer.result()


@dataclass
class Trained:
    """A step as its learner saw it."""

    numbers: list[int]
    """Of its completions."""
    tokens: int
    staleness: float
    """Updates, mean over tokens."""
    max_staleness: int


@dataclass
class CardLearner:
    """An update takes `token_s` seconds a token, counted over all of its cards."""

    cards: Cards
    ledger: Ledger
    token_s: float
    trained: list[Trained] = field(default_factory=list)

    def update(self, batch: RolloutBatch) -> Any:
        version = len(self.trained)
        numbers = batch.sequences.tokens.reshape(-1, 2)[:, 1]
        lengths = self.ledger.lengths.reshape(-1)[numbers]
        behind = version - self.ledger.versions.reshape(-1)[numbers]
        tokens = int(lengths.sum())
        seconds = tokens * self.token_s
        ended_s = self.cards.take(seconds)
        oldest = int(self.ledger.oldest.reshape(-1)[numbers].min())
        staleness = float((behind * lengths).sum() / tokens)
        self.trained.append(Trained(numbers.tolist(), tokens, staleness, version - oldest))
        return Later(self.cards.timeline, ended_s, UPDATE)

    def logprobs(self, sequences: Sequences) -> Floats:
        return np.zeros(sequences.num_completion_tokens, np.float32)
