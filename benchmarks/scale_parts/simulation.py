"""One set-up on virtual time: the real `driver.train` or `driver_ahead.train_ahead`, and what it made of
its GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frpo import driver_ahead
from frpo.config import Config
from frpo.driver import Partners, Start, Step, train
from frpo.driver_ahead import train_ahead
from frpo.steering import begin_steering
from frpo.window import Window

from .engines import Engine, Meter, Speed
from .partners import (
    CardLearner,
    CardReference,
    Cards,
    Ledger,
    RewardsLater,
    SamePrompts,
)
from .rollouts import SimulatedPublisher, SimulatedRollouts
from .timeline import Timeline, keep_time


@dataclass(frozen=True)
class Lengths:
    """Lognormal, cut at `limit`; `mean` tokens after that."""

    mean: float
    sigma: float
    limit: int

    def draw(self, prompts: int, k: int, seed: int = 0) -> NDArray[np.int64]:
        """[prompts, k]"""
        normal = np.random.default_rng(seed).normal(size=(prompts, k))
        values = np.exp(self._centre() + self.sigma * normal)
        lengths: NDArray[np.int64] = np.clip(np.rint(values), 1, self.limit).astype(np.int64)
        return lengths

    def _centre(self) -> float:
        """mu of E[min(X, limit)] = mean, by bisection."""
        low, high = 0.0, math.log(self.limit)
        for _ in range(60):
            centre = (low + high) / 2
            if self._mean_of(centre) < self.mean:
                low = centre
            else:
                high = centre
        return low

    def _mean_of(self, centre: float) -> float:
        cut = (math.log(self.limit) - centre) / self.sigma
        below = math.exp(centre + self.sigma**2 / 2) * _share_below(cut - self.sigma)
        return below + self.limit * (1 - _share_below(cut))


def _share_below(x: float) -> float:
    """Of a standard normal variable."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


@dataclass(frozen=True)
class Scenario:
    """A set-up of GPUs and the work it is given."""

    engines: int
    learners: int
    prompts: int
    """A step."""
    k: int
    lengths: Lengths
    update_token_s: float
    """Seconds a token on one of the learners' cards, which share a batch."""
    speed: Speed = field(default_factory=Speed)
    staleness: int = 0
    in_flight: bool = True
    room: float | None = None
    """Times max_num_seqs that an engine has in hand; None: RolloutPool's own rule, 2."""
    reward_s: float = 1.0
    reference_token_s: float | None = None
    """Seconds a token on one card; None: no reference."""
    references: int = 0
    """Cards of their own for it; 0: the learners score."""
    publishes_first: bool = False
    """Weights are sent before the scoring that waits for the learners: not what they do."""
    send_s: float = 0.2
    load_s: float = 0.3
    """In which an engine draws nothing."""
    shares_cards: bool = False
    """Engines and learners take turns on the same cards, and `turn_s` go by at each change of hands."""
    turn_s: float = 0.0
    warm_up: int = 3
    """Steps before those that are measured."""
    measured: int = 5

    @property
    def num_gpus(self) -> int:
        return self.engines if self.shares_cards else self.engines + self.learners + self.references

    @property
    def num_steps(self) -> int:
        """The last ones never come: the engines have work up to the end of what is measured."""
        return self.warm_up + self.measured + self.staleness + 2


class WatchedWindow(Window):
    """Tells when a step had all the groups it needs and waited for older ones still."""

    timeline: Timeline
    waited_s: list[float]
    since: float | None = None

    @property
    def ready(self) -> bool:
        is_ready = super().ready
        if self.since is None and len(self.drawn) >= self.size:
            self.since = self.timeline.now
        if is_ready:
            assert self.since is not None
            self.waited_s.append(self.timeline.now - self.since)
            self.since = None
        return is_ready


@contextmanager
def watch_windows(timeline: Timeline) -> Iterator[list[float]]:
    """Seconds that each step of a loop ahead waited, all that it needed being there but for what is too
    old to be left."""
    waited_s: list[float] = []
    watched = type("Watched", (WatchedWindow,), {"timeline": timeline, "waited_s": waited_s})
    module: Any = driver_ahead
    module.Window = watched
    try:
        yield waited_s
    finally:
        module.Window = Window


class Simulation:
    """A scenario that is being played."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = s = scenario
        self.timeline = Timeline()
        self.ledger = Ledger(s.lengths.draw(s.num_steps * s.prompts, s.k))
        self.engines = [Engine(self.timeline, s.speed) for _ in range(s.engines)]
        self.cards = Cards(self.timeline)
        self.learner = CardLearner(self.cards, self.ledger, s.update_token_s / s.learners)
        self.rollouts = SimulatedRollouts(self.timeline, self.engines, self.ledger, s.room)
        self.waited_s: list[float] = []
        self.marks: list[tuple[float, float, Meter]] = []
        """After each step: seconds, seconds that the learner's cards were busy, and the engines' meters
        added up."""
        self.steps: list[Step] = []

    def partners(self) -> Partners:
        s = self.scenario
        cards = Cards(self.timeline) if s.references else self.cards
        reference: Any = None
        if s.reference_token_s is not None:
            per_token_s = s.reference_token_s / (s.references or s.learners)
            reference = CardReference(cards, self.ledger, per_token_s, waits=s.shares_cards)
        publisher = SimulatedPublisher(
            self.rollouts, self.cards, s.send_s + 2 * s.turn_s, s.load_s, s.in_flight, s.publishes_first
        )
        rollouts: Any = self.rollouts
        learner: Any = self.learner
        rewards = RewardsLater(self.timeline, s.reward_s)
        return Partners(SamePrompts(s.prompts), rollouts, rewards, reference, learner, publisher)

    def play(self) -> dict[str, Any]:
        s = self.scenario
        config = make_config(s)
        loop = train_ahead if s.staleness else train
        begun = Start(0, begin_steering(config.arms[0].objective))
        with keep_time(self.timeline), watch_windows(self.timeline) as self.waited_s:
            for step in loop(config, config.arms[0], self.partners(), begun, lambda: None):
                self.steps.append(step)
                self._mark()
                if len(self.steps) == s.warm_up + s.measured:
                    break
        return self.describe()

    def _mark(self) -> None:
        meters = [engine.read_meter() for engine in self.engines]
        total = Meter(
            sum(meter.any_s for meter in meters),
            sum(meter.full_s for meter in meters),
            sum(meter.place_s for meter in meters),
            sum(meter.tokens for meter in meters),
        )
        self.marks.append((self.timeline.now, self.cards.worked_s(), total))

    def describe(self) -> dict[str, Any]:
        s = self.scenario
        begin, end = self.marks[s.warm_up - 1], self.marks[-1]
        seconds = end[0] - begin[0]
        meter = end[2] - begin[2]
        engine_s = seconds * s.engines
        trained = self.learner.trained[s.warm_up : s.warm_up + s.measured]
        phases = [step.metrics.phases for step in self.steps[s.warm_up :]]
        tokens = sum(step.tokens for step in trained)
        if s.staleness:
            tails = self.waited_s[s.warm_up : s.warm_up + s.measured]
        else:
            tails = [last - first for first, last in self.rollouts.drained_s[s.warm_up :]]
        return {
            "engine_use_any": meter.any_s / engine_s,
            "engine_use_full": meter.full_s / engine_s,
            "engine_use_places": meter.place_s / engine_s / s.speed.slots,
            "engine_use_tokens": meter.tokens / engine_s / s.speed.tokens_per_s,
            "learner_use": (end[1] - begin[1]) / seconds,
            "step_s": seconds / s.measured,
            "tokens_per_s_per_gpu": tokens / seconds / s.num_gpus,
            "staleness": abs(mean(step.staleness for step in trained)),
            "max_staleness": max(step.max_staleness for step in trained),
            "tail_s": mean(tails),
            "generate_s": mean(phase.generate_s for phase in phases),
            "score_s": mean(phase.score_s for phase in phases),
            "update_s": mean(phase.update_s for phase in phases),
            "publish_s": mean(phase.publish_s for phase in phases),
            "longest": int(self.ledger.lengths.max()),
        }


def make_config(scenario: Scenario) -> Config:
    rows = [{"path": "nowhere.jsonl", "task": "only"}]
    beta = 0.0 if scenario.reference_token_s is None else 0.01
    return Config.model_validate(
        {
            "name": "scale",
            "seed": 0,
            "model": {"path": "nowhere"},
            "data": {"train": rows, "heldout": rows},
            "rewards": [{"kind": "function", "name": "only", "function": "nowhere:only"}],
            "rollout": {
                "prompts_per_step": scenario.prompts,
                "group_size": scenario.k,
                "max_new_tokens": scenario.lengths.limit,
                "max_num_seqs": scenario.speed.slots,
                "staleness": scenario.staleness,
                "in_flight": scenario.in_flight,
                "parity_every": 1_000_000,
            },
            "objective": {"estimator": {"kind": "grpo"}, "penalty": "k3", "beta": beta},
            "learner": {"num_steps": scenario.num_steps, "micro_batch_tokens": 65_536},
            "arms": [{"name": "arm"}],
        }
    )
