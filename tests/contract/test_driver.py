"""The loop with fake partners: reward rises, a resumed run is the same run, and what must stop it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from frpo.config import Config, ObjectiveConfig
from frpo.driver import Partners, Start, first_of, train
from frpo.stats import StepMetrics, UpdateStats
from frpo.steering import begin_steering
from frpo.stops import RunStopped
from frpo.types import Completion, Group, RolloutBatch, Steering
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

GOOD_TO_BAD = (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)


def run(
    cfg: Config,
    learner: FakeLearner,
    *,
    resumed: tuple[int, Steering] | None = None,
    stop: int | None = None,
    table=GOOD_TO_BAD,
    broken: bool = False,
    reference: bool = True,
) -> tuple[list[StepMetrics], FakePrompts, Steering]:  # type: ignore[no-untyped-def]
    engine, prompts = FakeEngine(), FakePrompts(cfg.rollout.prompts_per_step)
    partners = Partners(
        prompts,
        engine,
        FakeRewards(table),
        FakeReference() if reference else None,
        learner,
        FakePublisher(learner, engine, broken),
    )
    rows: list[StepMetrics] = []
    start, last = resumed or (0, begin_steering(cfg.arms[0].objective))
    for done in train(cfg, cfg.arms[0], partners, Start(start, last)):
        rows.append(done.metrics)
        last = done.steering
        if done.metrics.step == stop:
            break
    return rows, prompts, last


def test_the_sample_of_a_step_is_its_first_group_by_prompt_whatever_came_first() -> None:
    cfg = config()
    learner, engine = FakeLearner(cfg.arms[0].objective), FakeEngine()
    prompts = FakePrompts(cfg.rollout.prompts_per_step)
    partners = Partners(
        prompts, engine, FakeRewards(GOOD_TO_BAD), FakeReference(), learner, FakePublisher(learner, engine)
    )
    steps = train(cfg, cfg.arms[0], partners, Start(0, begin_steering(cfg.arms[0].objective)))
    assert [next(steps).sample.group.index for _ in range(2)] == [0, 0]
    sample = next(steps).sample
    assert len(sample.rewards) == len(sample.group.completions) == cfg.rollout.group_size
    others = [replace(sample, group=replace(sample.group, index=index)) for index in (7, 3, 5)]
    assert first_of(others).group.index == 3


@pytest.mark.parametrize(("kind", "settings"), [("grpo", {}), ("rloo", {}), ("frpo", {"lam": 0.5})])
@pytest.mark.parametrize("penalty", ["k3", "reverse"])
def test_reward_rises_and_kl_stays_bounded(kind: str, settings: dict[str, float], penalty: str) -> None:
    cfg = config(estimator={"kind": kind, **settings}, penalty=penalty, beta=0.05)
    rows, *_ = run(cfg, FakeLearner(cfg.arms[0].objective))
    assert len(rows) == 30
    assert [r.step for r in rows] == list(range(1, 31))
    first, last = (np.mean([r.batch.reward for r in part]) for part in (rows[:3], rows[-3:]))
    assert first < 0.6
    assert last > 0.85
    assert rows[-1].update.kl is not None
    assert 0.3 < rows[-1].update.kl < np.log(6)
    assert max(r.update.mismatch_kl for r in rows) < 1e-9


@pytest.mark.parametrize(
    "objective", [{}, {"estimator": {"rho": 0.3}, "target_kl": 0.4}], ids=["given", "steered"]
)
def test_a_run_resumed_from_a_checkpoint_is_the_same_run(tmp_path: Path, objective: dict[str, float]) -> None:
    cfg = config(beta=0.05, **objective)
    whole = FakeLearner(cfg.arms[0].objective)
    rows, prompts, _ = run(cfg, whole)
    assert prompts.taken == list(range(30))
    first = FakeLearner(cfg.arms[0].objective)
    *_, state = run(cfg, first, stop=13)
    first.save(tmp_path / "engine")
    second = FakeLearner(cfg.arms[0].objective)
    second.load(tmp_path / "engine")
    again, prompts, _ = run(cfg, second, resumed=(13, state))
    assert prompts.taken == list(range(13, 30))
    assert torch.equal(second.logits, whole.logits)
    assert [r.batch.reward for r in again] == [r.batch.reward for r in rows[13:]]


@pytest.mark.parametrize(
    ("objective", "updates", "asked"),
    [
        ({}, 1, False),
        ({"penalty": "reverse"}, 1, True),
        ({"penalty": "reverse", "beta": 0.0}, 1, False),
        ({}, 2, True),
    ],
)
def test_the_learner_scores_what_was_drawn_where_that_is_wanted_before_the_update(
    objective: dict[str, object], updates: int, asked: bool
) -> None:
    cfg = config(**{"beta": 0.05, **objective})
    arm = cfg.arms[0].model_copy(
        update={"learner": cfg.learner.model_copy(update={"updates_per_batch": updates})}
    )
    learner = FakeLearner(arm.objective)
    rows, *_ = run(cfg.model_copy(update={"arms": (arm,)}), learner, stop=2)
    assert sorted(learner.scored) == (sorted([*range(6), *range(6)]) if asked else [])
    assert all((b.old is not None) == asked for b in learner.seen)
    assert (
        rows[0].update.kl == 0.0
    )  # the policy is the reference, though the engine's log-probs of it are others
    assert rows[1].update.kl is not None
    assert abs(rows[1].update.kl) > 1e-4


def test_without_a_penalty_no_reference_is_asked() -> None:
    cfg = config(beta=0.0)
    rows, *_ = run(cfg, FakeLearner(cfg.arms[0].objective), reference=False)
    assert all(r.update.kl is None for r in rows)


def test_failed_rewards_leave_their_groups_and_are_counted() -> None:
    cfg = config(beta=0.0).model_copy(update={"max_failed_rewards": 0.9})
    learner = FakeLearner(cfg.arms[0].objective)
    rows, *_ = run(cfg, learner, table=(1.0, 0.8, 0.5, 0.3, 0.1, None), stop=1)
    assert rows[0].batch.failed_rewards > 0
    assert len(learner.seen[0].sequences) == 48 - rows[0].batch.failed_rewards
    assert 5 not in learner.seen[0].sequences.tokens.reshape(-1, 3)[:, 2]


def test_too_many_failed_rewards_stop_the_run_with_the_rewards_own_words() -> None:
    cfg = config(beta=0.0)
    with pytest.raises(
        RunStopped, match=r"step 1: \d+ of 48 rewards failed \(max_failed_rewards = 0.1\): no judge"
    ):
        run(cfg, FakeLearner(cfg.arms[0].objective), table=(None, None, None, 0.3, 0.1, 0.0))


def test_an_engine_that_keeps_old_weights_is_found() -> None:
    cfg = config(beta=0.0)
    loose = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"max_mismatch_kl": 1e9})})
    with pytest.raises(RunStopped, match=r"step 5: engine and learner differ by .* nats"):
        run(loose, FakeLearner(cfg.arms[0].objective), broken=True)
    strict = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"max_mismatch_kl": 1e-3})})
    with pytest.raises(
        RunStopped, match=r"step 2: KL\(engine \|\| learner\) is .* above rollout.max_mismatch_kl = 0.001"
    ):
        run(strict, FakeLearner(cfg.arms[0].objective), broken=True)


NAN = float("nan")


class Wrong(FakeLearner):
    """Gives numbers that are none from a step on."""

    def __init__(self, objective: ObjectiveConfig, first: int, **numbers: float) -> None:
        super().__init__(objective)
        self.first, self.numbers = first, numbers

    def learn(self, batch: RolloutBatch) -> UpdateStats:
        stats = super().learn(batch)
        return replace(stats, **self.numbers) if len(self.seen) >= self.first else stats


@pytest.mark.parametrize("number", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("field", "name"),
    [("loss", "loss"), ("grad_norm", "gradient norm"), ("entropy", "entropy"), ("penalty", "penalty")],
)
def test_a_number_that_is_none_stops_the_run_before_the_step_is_logged_or_saved(
    field: str, name: str, number: float
) -> None:
    cfg = config(beta=0.0)
    learner, engine = Wrong(cfg.arms[0].objective, 3, **{field: number}), FakeEngine()
    partners = Partners(
        FakePrompts(6), engine, FakeRewards(GOOD_TO_BAD), None, learner, FakePublisher(learner, engine)
    )
    steps = train(cfg, cfg.arms[0], partners, Start(0, begin_steering(cfg.arms[0].objective)))
    rows = [next(steps).metrics, next(steps).metrics]
    with pytest.raises(
        RunStopped,
        match=rf"step 3: the {name} is {number}: this update broke the policy.* "
        r"lower learning_rate \(here 2\)",
    ):
        next(steps)
    assert [r.step for r in rows] == [1, 2]
    assert engine.version == 2  # and nothing broken is published


@pytest.mark.parametrize("number", [NAN, float("inf")])
def test_a_mismatch_that_is_no_number_is_above_the_limit(number: float) -> None:
    cfg = config(beta=0.0)
    with pytest.raises(
        RunStopped,
        match=r"step 1: KL\(engine \|\| learner\) is (nan|inf) nats per token, above rollout.max_mismatch_kl",
    ):
        run(cfg, Wrong(cfg.arms[0].objective, 1, mismatch_kl=number))


@pytest.mark.parametrize("who", ["engine", "learner"])
def test_log_probs_that_are_none_are_said_of_whoever_gives_them(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = FakeEngine if who == "engine" else FakeLearner
    monkeypatch.setattr(
        broken, "logprobs", lambda self, sequences: np.full(len(sequences), np.nan, np.float32)
    )
    cfg = config(beta=0.0)
    with pytest.raises(
        RunStopped,
        match=rf"step 1: a log-prob of the {who} is nan: the weights or the activations left the range",
    ):
        run(cfg, FakeLearner(cfg.arms[0].objective))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_reference_or_a_reward_out_of_range_stops_before_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(estimator={"kind": "grpo"}, beta=0.1)
    huge = FakeLearner(cfg.arms[0].objective)
    with pytest.raises(
        RunStopped,
        match=r"step 1: (the mean reward|an advantage) is (inf|nan): rewards are too large to add up",
    ):
        run(cfg, huge, table=(1e308,) * 3 + (-1e308,) * 3)
    with pytest.raises(
        RunStopped, match=r"step 1: an advantage is inf: rewards are too large"
    ):  # beyond float32
        run(cfg, huge, table=(1e39, 0.0, 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(
        FakeReference, "score", lambda self, group: Now(tuple(np.full(1, np.nan) for _ in group.completions))
    )
    with pytest.raises(
        RunStopped,
        match=r"step 1: a log-prob of the reference is nan: the weights or the activations left the range",
    ):
        run(cfg, huge)
    assert huge.seen == []


def test_groups_left_without_two_completions_name_what_cut_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FakeEngine.completion

    def cut(engine: FakeEngine, token: int, logp: torch.Tensor) -> Completion:
        return replace(whole(engine, token, logp), finish_reason="length")

    monkeypatch.setattr(FakeEngine, "completion", cut)
    cfg = config(beta=0.0, cut="mask")
    with pytest.raises(
        RunStopped,
        match=r"fewer than two completions that train; "
        "100% of all are cut at rollout.max_new_tokens = 1: raise it",
    ):
        run(cfg, FakeLearner(cfg.arms[0].objective))


def test_queues_are_counted_when_the_last_group_arrives() -> None:
    class Late(Now):
        def ready(self) -> bool:
            return False

    class LateRewards(FakeRewards):
        def score(self, group: Group) -> Now:
            answer = super().score(group).result()
            return Late(answer) if group.index < 2 else Now(answer)

    cfg = config()
    learner, engine = FakeLearner(cfg.arms[0].objective), FakeEngine()
    partners = Partners(
        FakePrompts(6),
        engine,
        LateRewards(GOOD_TO_BAD),
        FakeReference(),
        learner,
        FakePublisher(learner, engine),
    )
    steps = train(cfg, cfg.arms[0], partners, Start(28, begin_steering(cfg.arms[0].objective)))
    rows = [done.metrics for done in steps]
    assert [(r.phases.waiting_rewards, r.phases.waiting_reference) for r in rows] == [(2, 0), (2, 0)]


@pytest.mark.parametrize("penalty", ["k3", "reverse"])
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_beta_is_steered_to_the_kl_asked_for(penalty: str, target: float) -> None:
    cfg = config(estimator={"kind": "grpo"}, penalty=penalty, beta=0.1, target_kl=target)
    arm = cfg.arms[0].model_copy(
        update={"learner": cfg.arms[0].learner.model_copy(update={"num_steps": 100})}
    )
    cfg = cfg.model_copy(update={"arms": (arm,)})
    rows, *_ = run(cfg, FakeLearner(arm.objective, learning_rate=1.0))
    assert np.mean([r.update.kl or 0.0 for r in rows[-10:]]) == pytest.approx(target, abs=0.1)
    assert len({r.batch.beta for r in rows}) > 50


def test_radius_mode_ends_near_its_radius_and_logs_what_single_batches_miss() -> None:
    cfg = config(estimator={"rho": 0.3}, beta=0.1)
    rows, *_ = run(cfg, FakeLearner(cfg.arms[0].objective, learning_rate=0.2))
    radii = [r.batch.radius or 0.0 for r in rows]
    assert radii[0] == pytest.approx(0.3, abs=1e-6)  # nothing to smooth with yet
    assert np.mean(radii[5:]) == pytest.approx(0.3, abs=0.06)
    assert np.std(radii[5:]) > 1e-3
    assert all(1 <= (r.batch.effective_samples or 0) <= 8 for r in rows)
    assert all(r.batch.lam and r.batch.lam > 0 for r in rows)


def test_an_arm_stops_at_the_reward_asked_for_and_a_resumed_one_does_no_step_more() -> None:
    cfg = config(beta=0.05)
    whole, *_ = run(cfg, FakeLearner(cfg.arms[0].objective))
    rewards = [r.batch.reward for r in whole]
    enough = 0.8
    expected = next(n for n in range(5, 31) if np.mean(rewards[n - 5 : n]) >= enough)
    assert 5 < expected < 25
    arm = cfg.arms[0].model_copy(
        update={"learner": cfg.arms[0].learner.model_copy(update={"stop_at_reward": enough})}
    )
    cfg = cfg.model_copy(update={"arms": (arm,)})
    learner = FakeLearner(arm.objective)
    rows, _, state = run(cfg, learner)
    assert [r.batch.reward for r in rows] == rewards[:expected]
    assert run(cfg, learner, resumed=(expected, state))[0] == []
