"""The loop that runs ahead, with fake partners: every prompt trains once, none by tokens that are too old,
each token is weighed by what drew it, and a resumed run loses nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from frpo.config import Config
from frpo.driver import Partners, Start, Step
from frpo.driver_ahead import train_ahead
from frpo.flights import read_flight, write_flight
from frpo.roles import Running
from frpo.stats import UpdateStats
from frpo.steering import begin_steering
from frpo.stops import RunStopped
from frpo.types import Arrivals, Floats, RolloutBatch, Sampling
from tests.support.fakes import (
    FakeEngine,
    FakeLearner,
    FakePrompts,
    FakePublisher,
    FakeReference,
    FakeRewards,
    FakeSession,
    config,
)

TABLE = (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)


class Later:
    """An update that is there after some looks; it is computed when it is."""

    def __init__(self, learn: Callable[[], UpdateStats], looks: int) -> None:
        self.learn, self.looks = learn, looks

    def ready(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def result(self) -> UpdateStats:
        return self.learn()

    def on_ready(self, call: Callable[[], None]) -> None: ...


class SlowLearner(FakeLearner):
    """While it updates the engine finishes some groups."""

    looks = 4

    def update(self, batch: RolloutBatch) -> Later:  # type: ignore[override]
        return Later(lambda: self.learn(batch), self.looks)


@dataclass
class Run:
    """A run of the loop and what it left behind."""

    cfg: Config
    learner: FakeLearner = field(init=False)
    engine: FakeEngine = field(default_factory=FakeEngine)
    prompts: FakePrompts = field(init=False)
    done: list[Step] = field(default_factory=list)
    broken: bool = False
    polled: int = 0

    def __post_init__(self) -> None:
        self.learner = SlowLearner(self.cfg.arms[0].objective, learning_rate=2.0)
        self.prompts = FakePrompts(self.cfg.rollout.prompts_per_step)

    def poll(self) -> None:
        self.polled += 1

    def go(self, start: Start | None = None, stop: int | None = None) -> Run:
        publisher = FakePublisher(self.learner, self.engine, self.broken)
        partners = Partners(
            self.prompts, self.engine, FakeRewards(TABLE), FakeReference(), self.learner, publisher
        )
        arm = self.cfg.arms[0]
        start = start or Start(0, begin_steering(arm.objective))
        for step in train_ahead(self.cfg, arm, partners, start, self.poll):
            self.done.append(step)
            if step.metrics.step == stop:
                break
        return self


def ahead(staleness: int, **objective: object) -> Config:
    cfg = config(**{"beta": 0.05, "estimator": {"kind": "grpo"}, **objective})
    return cfg.model_copy(
        update={"rollout": cfg.rollout.model_copy(update={"staleness": staleness, "parity_every": 1000})}
    )


@pytest.mark.parametrize("staleness", [1, 2, 4])
@pytest.mark.parametrize("penalty", ["k3", "reverse"])
def test_the_reward_rises_and_each_prompt_is_drawn_once(staleness: int, penalty: str) -> None:
    run = Run(ahead(staleness, penalty=penalty)).go()
    rows = [step.metrics for step in run.done]
    assert [row.step for row in rows] == list(range(1, 31))
    assert np.mean([row.batch.reward for row in rows[-3:]]) > 0.8
    assert run.prompts.places == list(range(30 * 6))
    (session,) = run.engine.drawings
    assert session.begun == list(range(30 * 6))
    assert session.closed
    assert max(row.batch.max_staleness for row in rows) <= staleness
    assert max(row.batch.staleness for row in rows) > 0
    assert run.done[-1].last


def test_groups_are_drawn_while_the_learner_updates() -> None:
    run = Run(ahead(1)).go(stop=3)
    assert run.done[0].flight is not None
    assert len(run.done[0].flight.groups) == 4  # one at each look


def test_tokens_are_weighed_by_what_drew_them_and_the_mismatch_is_of_fresh_ones_alone() -> None:
    run = Run(ahead(2)).go(stop=8)
    batches = run.learner.seen
    for step, batch in enumerate(batches):
        update = run.done[step].metrics.update
        if batch.fresh.any():
            assert update.mismatch_kl == pytest.approx(0, abs=1e-9)
        else:
            assert update.mismatch_kl is None
        if not batch.fresh.all():
            assert update.stale_kl is not None
            assert update.stale_kl > 1e-7
    assert any(not batch.fresh.all() for batch in batches)
    assert any(batch.fresh.any() for batch in batches)


def test_the_policy_is_scored_as_it_is_when_it_is_updated() -> None:
    """For the penalty in the advantages: not when the group arrived."""
    run = Run(ahead(2, penalty="reverse"))
    now: list[Floats] = []

    class Learner(SlowLearner):
        def learn(self, batch: RolloutBatch) -> UpdateStats:
            now.append(self.logprobs(batch.sequences))
            return super().learn(batch)

    run.learner = Learner(run.cfg.arms[0].objective, learning_rate=2.0)
    run.go(stop=6)
    for batch, logprobs in zip(run.learner.seen, now, strict=True):
        assert batch.old is not None
        np.testing.assert_allclose(batch.old, logprobs, rtol=1e-6)


@pytest.mark.parametrize("stop", [1, 7])
def test_a_resumed_run_draws_what_was_under_way_again_and_trains_on_all_that_was_drawn(
    tmp_path: Path, stop: int
) -> None:
    first = Run(ahead(2)).go(stop=stop)
    last = first.done[-1]
    assert last.flight is not None
    write_flight(tmp_path, last.flight)
    first.learner.save(tmp_path / "engine")
    flight = read_flight(tmp_path, first.prompts)
    assert flight is not None
    assert (flight.begun, flight.waiting) == (last.flight.begun, last.flight.waiting)
    for mine, theirs in zip(flight.groups, last.flight.groups, strict=True):
        assert (mine.index, mine.prompt.id) == (theirs.index, theirs.prompt.id)
        for own, other in zip(mine.completions, theirs.completions, strict=True):
            assert (own.text, own.finish_reason) == (other.text, other.finish_reason)
            np.testing.assert_array_equal(own.token_ids, other.token_ids)
            np.testing.assert_array_equal(own.logprobs, other.logprobs)
            np.testing.assert_array_equal(own.versions, other.versions)

    second = Run(ahead(2))
    second.learner.load(tmp_path / "engine")
    second.go(Start(stop, last.steering, flight))
    kept = [group.index for group in flight.groups]
    (session,) = second.engine.drawings
    assert session.begun == [*flight.waiting, *range(flight.begun, 30 * 6)]
    before = set(range(flight.begun)) - set(flight.waiting) - set(kept)
    assert len(before) == stop * 6  # what the first part trained on
    assert len(second.learner.seen) == 30 - stop
    assert sum(len(batch.sequences) for batch in second.learner.seen) == (30 - stop) * 6 * 8


def test_what_an_engine_lost_is_drawn_again_by_its_own_seed() -> None:
    class Engine(FakeEngine):
        def open(self, sampling: Sampling) -> FakeSession:
            session = super().open(sampling)
            session.dies = {1, 5, 9}
            return session

    run, whole = Run(ahead(1)), Run(ahead(1)).go(stop=4)
    run.engine = Engine()
    run.go(stop=4)
    (session,) = run.engine.drawings
    assert session.dies == set()
    assert Counter(session.begun) - Counter(whole.engine.drawings[0].begun) == Counter([1, 5, 9])
    assert {len(seeds) for seeds in session.seeds.values()} == {1}
    assert session.seeds.items() >= whole.engine.drawings[0].seeds.items()
    assert all(len(batch.sequences) == 48 for batch in run.learner.seen)


def test_without_anything_to_wait_for_a_run_does_not_hang() -> None:
    """An engine that never finishes is named by its session."""

    class Stuck(FakeSession):
        def wait(self, until: Running[object] | None = None) -> Arrivals:
            raise TimeoutError("rollout worker 0 finished no group within 5 s.")

    class Engine(FakeEngine):
        def open(self, sampling: Sampling) -> FakeSession:
            return Stuck(self, sampling)

    run = Run(ahead(1))
    run.engine = Engine()
    with pytest.raises(TimeoutError, match="rollout worker 0"):
        run.go()
    assert run.engine.drawings[0].closed


def test_an_update_that_is_no_number_is_not_published() -> None:
    class Learner(SlowLearner):
        def learn(self, batch: RolloutBatch) -> UpdateStats:
            stats = super().learn(batch)
            return replace(stats, loss=float("nan")) if len(self.seen) == 3 else stats

    run = Run(ahead(1))
    run.learner = Learner(run.cfg.arms[0].objective, learning_rate=2.0)
    with pytest.raises(RunStopped, match="step 3: the loss is nan"):
        run.go()
    assert run.engine.version == 2
    assert [step.metrics.step for step in run.done] == [1, 2]


def test_before_each_update_is_time_for_what_asks_for_it() -> None:
    """Such as a checkpoint that is being written."""
    run = Run(ahead(1))
    run.go(stop=4)
    assert run.polled == 4


def test_engines_that_do_not_run_the_learners_policy_stop_the_run() -> None:
    """That is checked at its start, when they do, and five steps later."""
    run = Run(ahead(1), broken=True)
    cfg = run.cfg
    run.cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"parity_every": None})})
    with pytest.raises(RunStopped, match=r"step 6: engine and learner differ by"):
        run.go()


def test_an_arm_that_has_reached_its_reward_gives_up_what_is_under_way() -> None:
    run = Run(ahead(2))
    arm = run.cfg.arms[0]
    early = arm.model_copy(update={"learner": arm.learner.model_copy(update={"stop_at_reward": 0.6})})
    run.cfg = run.cfg.model_copy(update={"arms": (early,)})
    run.go()
    assert len(run.done) < 30
    assert run.done[-1].last
    assert run.engine.drawings[0].closed
