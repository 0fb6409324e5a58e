"""The figures of a step, each told apart from its neighbours: times by a clock that partners move, the rest
by value."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest

from frpo.driver import Partners, Start, Step, train
from frpo.driver_ahead import train_ahead
from frpo.roles import Running
from frpo.stats import StepMetrics, Times, UpdateStats
from frpo.steering import begin_steering
from frpo.types import Arrivals, Group, Prompt, RolloutBatch, Sampling, Sequences
from tests.support.fakes import (
    FakeEngine,
    FakeLearner,
    FakePrompts,
    FakePublisher,
    FakeReference,
    FakeRewards,
    FakeSession,
    Now,
    config,
)

TABLE = (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)
UPDATE = {
    "loss": 0.1,
    "penalty": 0.2,
    "grad_norm": 0.3,
    "learning_rate": 0.4,
    "entropy": 0.5,
    "clip_share": 0.6,
    "capped_share": 0.7,
    "stale_kl": 0.8,
    "mismatch_kl": 0.02,
    "kl": 0.8,
    "num_computed_tokens": 9,
    "learner_s": 10.0,
}


@dataclass
class Clock:
    """Moves by what the partners say alone."""

    now: float = 1000.0
    cpu: float = 50.0

    def takes(self, seconds: float) -> None:
        self.now += seconds
        self.cpu += seconds / 4


@dataclass(frozen=True)
class Slow:
    """An answer that is waited for."""

    clock: Clock
    seconds: float
    answer: Any

    def ready(self) -> bool:
        return False

    def result(self) -> Any:
        self.clock.takes(self.seconds)
        return self.answer


@dataclass(frozen=True)
class Given:
    """What the engine and the rewards were asked."""

    seeds: list[tuple[int, ...]]
    sampling: list[Sampling]
    versions: list[int]
    steps: list[int]
    checked: list[Sequences]


def steps(
    count: int, clock: Clock | None = None, start: int = 0, prompts: int = 6, **rollout: Any
) -> tuple[list[StepMetrics], Given]:
    """`count` steps. On the clock a group takes 1 s, its reward 10, its reference 20, parity 100 for each of
    the two, an update 1,000, a published version 5,000."""
    clock = clock or Clock()
    cfg = config(estimator={"kind": "grpo"}, beta=0.1)
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update=rollout)})
    given = Given([], [], [], [], [])

    class Engine(FakeEngine):
        def generate(
            self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
        ) -> Iterator[Group]:
            given.seeds.append(tuple(seeds))
            given.sampling.append(sampling)
            given.versions.append(policy_version)
            for group in super().generate(prompts, seeds, sampling, policy_version):
                clock.takes(1)
                yield group

        def logprobs(self, sequences: Sequences) -> Any:
            given.checked.append(sequences)
            clock.takes(100)
            return super().logprobs(sequences)

    class Learner(FakeLearner):
        def learn(self, batch: RolloutBatch) -> UpdateStats:
            clock.takes(1000)
            return replace(super().learn(batch), **UPDATE)

        def logprobs(self, sequences: Any) -> Any:
            clock.takes(100)
            return super().logprobs(sequences)

    class Rewards(FakeRewards):
        def score(self, group: Group) -> Any:
            return Slow(clock, 10, super().score(group).result())

    class Reference(FakeReference):
        def score(self, group: Group) -> Any:
            answer = super().score(group).result()
            return Slow(clock, 20, answer) if group.index else Now(answer)

    class Publisher(FakePublisher):
        def publish(self, policy_version: int) -> int:
            given.steps.append(policy_version)
            clock.takes(5000)
            return super().publish(policy_version) + policy_version

    engine, learner = Engine(), Learner(cfg.arms[0].objective)
    partners = Partners(
        FakePrompts(prompts), engine, Rewards(TABLE), Reference(), learner, Publisher(learner, engine)
    )
    arm = cfg.arms[0].model_copy(
        update={"learner": cfg.arms[0].learner.model_copy(update={"num_steps": start + count})}
    )
    done = list(train(cfg, arm, partners, Start(start, begin_steering(arm.objective))))
    assert [step.last for step in done] == [False] * (count - 1) + [True]
    return [step.metrics for step in done], given


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "process_time", lambda: clock.cpu)
    return clock


def test_each_phase_has_the_time_that_it_took(clock: Clock) -> None:
    first, second = (row.phases for row in steps(2, clock)[0])
    assert first.generate_s == 6  # groups
    assert first.score_s == 6 * 10 + 5 * 20  # rewards, and references but one
    assert first.update_s == 200 + 1000  # the check before it, of the first step, is the update's
    assert first.publish_s == 5000
    assert first.step_s == 6 + 160 + 1200 + 5000
    assert first.driver_s == first.step_s / 4
    assert first.other_s == 0
    assert (second.generate_s, second.score_s, second.update_s, second.publish_s) == (6, 160, 1000, 5000)
    assert second.step_s == 6166  # the step's own, not since the beginning
    assert second.driver_s == 6166 / 4


def test_a_step_says_when_its_phases_began_and_its_groups_were_drawn(clock: Clock) -> None:
    first, second = (row.times for row in steps(2, clock)[0])
    assert first == Times(
        generate_at=0,
        score_at=6,
        update_at=6 + 160,
        publish_at=6 + 160 + 1200,
        drawn=((0, 6),),
        groups_ahead=0,
    )
    began = 6 + 160 + 1200 + 5000
    assert second == Times(
        generate_at=began,
        score_at=began + 6,
        update_at=began + 6 + 160,
        publish_at=began + 6 + 160 + 1000,
        drawn=((began, began + 6),),
        groups_ahead=0,
    )


def steps_ahead(clock: Clock, begun: Start | None = None) -> list[Step]:
    """Three steps with a staleness of 1. A group takes 1 s, an update 10 beside the two groups that are drawn
    during it, a published version 5; scores are there at once."""
    cfg = config(beta=0.1)
    rollout = cfg.rollout.model_copy(update={"staleness": 1, "parity_every": 1000})
    cfg = cfg.model_copy(update={"rollout": rollout})

    class Session(FakeSession):
        def wait(self, until: Running[object] | None = None) -> Arrivals:
            clock.takes(1 if self.drawing else 0)
            return super().wait(until)

    class Engine(FakeEngine):
        def open(self, sampling: Sampling) -> FakeSession:
            return Session(self, sampling)

    @dataclass
    class Update:
        answer: UpdateStats
        looks: int = 2

        def ready(self) -> bool:
            self.looks -= 1
            return self.looks < 0

        def result(self) -> UpdateStats:
            clock.takes(10)
            return self.answer

    class Learner(FakeLearner):
        def update(self, batch: RolloutBatch) -> Any:
            return Update(self.learn(batch))

    class Publisher(FakePublisher):
        def publish(self, policy_version: int) -> int:
            clock.takes(5)
            return super().publish(policy_version)

    engine, learner = Engine(), Learner(cfg.arms[0].objective)
    publisher = Publisher(learner, engine)
    partners = Partners(FakePrompts(6), engine, FakeRewards(TABLE), FakeReference(), learner, publisher)
    begun = begun or Start(0, begin_steering(cfg.arms[0].objective))
    return list(itertools.islice(train_ahead(cfg, cfg.arms[0], partners, begun, lambda: None), 3))


def test_a_step_says_what_was_drawn_ahead_of_it(clock: Clock) -> None:
    """Numbers are drawn in the order 1 4 7 10 2 5, which is the first step; 8 0 in its update; then, when
    12 to 17 have begun, 12 15 13 16 11 3 14 6 17 9."""
    first, second, third = (step.metrics for step in steps_ahead(clock))
    assert first.times == Times(0, 6, 6, 18, drawn=((0, 6),), groups_ahead=0)
    assert (first.phases.update_s, first.phases.publish_s) == (12, 5)
    # 0 3 6 8 9 begun at 0 and 11 at 2; of them 8 and 0 were there, 9 came last
    assert second.times == Times(23, 33, 33, 43, drawn=((0, 33),), groups_ahead=2)
    assert second.phases.generate_s == 10
    # 12 to 17 begun at 23, 17 came last of them: the step waits for nothing
    assert third.times == Times(48, 48, 48, 60, drawn=((23, 32),), groups_ahead=6)
    assert third.phases.generate_s == 0


def test_the_clock_of_a_resumed_loop_begins_again(clock: Clock) -> None:
    first = steps_ahead(clock)[0]
    clock.takes(1000)
    second, third, _ = (step.metrics for step in steps_ahead(clock, Start(1, first.steering, first.flight)))
    # 8 and 0 are there; 12 15 13 16 are the next, now that 3 6 9 11 are to be drawn by newer weights
    assert second.times == Times(0, 4, 4, 16, drawn=((0, 4),), groups_ahead=2)
    # 11 and 3 came in the update; 6 9 14 17, begun at 0 too, after 23 18 21 19 22
    assert third.times == Times(21, 30, 30, 41, drawn=((0, 30),), groups_ahead=2)


def test_what_the_learner_measured_stands_under_its_own_name() -> None:
    (row,), _ = steps(1)
    assert asdict(row.update) == UPDATE


def test_a_step_counts_itself_its_prompts_and_what_it_waits_for() -> None:
    rows, given = steps(3)
    assert [row.step for row in rows] == [row.policy_version for row in rows] == [1, 2, 3]
    assert [row.batch.num_prompts for row in rows] == [6, 6, 6]
    assert {(row.phases.waiting_rewards, row.phases.waiting_reference) for row in rows} == {(6, 5)}
    assert [row.published_bytes for row in rows] == [25, 26, 27]  # 24 bytes of logits, and what the fake adds
    assert given.steps == [0, 1, 2, 3]
    assert given.versions == [0, 1, 2]


def test_parity_is_checked_at_the_first_step_and_then_at_every_so_many(clock: Clock) -> None:
    rows, _ = steps(9, clock, start=2, parity_every=4)
    assert [row.step for row in rows if row.phases.update_s > 1000] == [3, 5, 9]


def test_parity_is_checked_on_the_first_completions_of_the_first_eight_prompts() -> None:
    _, given = steps(1, prompts=12)
    (sample,) = given.checked
    assert sample.tokens.reshape(8, 3)[:, :2].tolist() == [[9, i] for i in range(8)]
    engine = FakeEngine()
    engine.version = 0
    drawn = engine.generate(FakePrompts(12).take(0), given.seeds[0], given.sampling[0], 0)
    first = {group.index: int(group.completions[0].token_ids[0]) for group in drawn}
    assert sample.tokens.reshape(8, 3)[:, 2].tolist() == [first[i] for i in range(8)]


def test_completions_are_drawn_as_the_recipe_says() -> None:
    _, given = steps(1, temperature=0.7, top_p=0.9, stop=("###",))
    assert given.sampling == [Sampling(8, 1, 0.7, 0.9, ("###",))]


def test_every_prompt_of_every_step_has_a_seed_of_its_own_whenever_the_run_began() -> None:
    whole = steps(6)[1].seeds
    assert len(set(itertools.chain.from_iterable(whole))) == 36
    assert steps(3, start=3)[1].seeds == whole[3:]
    digest = hashlib.sha256(b"7/rollout/4/2").digest()  # run's seed, purpose, step, prompt
    assert whole[4][2] == int.from_bytes(digest[:8], "big") >> 17 << 16
