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

from frpo.driver import Partners, Start, train
from frpo.steering import begin_steering
from frpo.types import Group, Prompt, RolloutBatch, Sampling, Sequences, StepMetrics, UpdateStats
from tests.support.fakes import (
    FakeEngine,
    FakeLearner,
    FakePrompts,
    FakePublisher,
    FakeReference,
    FakeRewards,
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
