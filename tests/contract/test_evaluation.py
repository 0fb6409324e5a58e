"""What a policy is worth, by sampling: with fake partners, against sums over the whole answer space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from frpo.certificate import tilt_to, worst_case_reward
from frpo.config import CertifyConfig, Config, ConfigError, FrpoEstimator, GrpoEstimator, ObjectiveConfig
from frpo.evaluation import (
    Against,
    Draws,
    Label,
    Measurers,
    Opposite,
    estimate_mean,
    evaluate,
    make_certificate,
    make_certificates,
)
from frpo.records import Evaluation
from frpo.roles import PolicyScorer
from frpo.stops import RunStopped
from frpo.types import Completion, Floats, Group, Prompt, Reward, Sampling
from tests.support.fakes import ANSWERS, FakeEngine, FakeLearner, FakePrompts, FakeRewards, Now, config

TABLE = (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)
BASE = Label("base")


def engine(scale: float = 1.0) -> FakeEngine:
    found = Off()
    found.logits, found.version = scale * torch.linspace(1.0, -1.0, ANSWERS), 0
    return found


def trainer(engine: FakeEngine) -> FakeLearner:
    """Of what the engine runs."""
    found = FakeLearner(ObjectiveConfig())
    found.logits = engine.logits
    return found


class Off(FakeEngine):
    """An engine whose log-probs are of another implementation: higher than the trainer's."""

    def completion(self, token: int, logp: torch.Tensor) -> Completion:
        found = super().completion(token, logp)
        return replace(found, logprobs=found.logprobs + np.float32(0.3))


class Uniform:
    """Scorer of one saved policy: uniform over the answers."""

    def submit(self, policy: Path, groups: Sequence[Group]) -> Now:
        rows: list[tuple[Floats, ...]] = [
            tuple(np.full(1, -np.log(ANSWERS), np.float32) for _ in g.completions) for g in groups
        ]
        return Now(rows)


def two_tasks(count: int) -> list[Prompt]:
    prompts = FakePrompts(count).take(0)
    return [Prompt(p.id, p.text, p.token_ids, "ab"[i % 2], {}) for i, p in enumerate(prompts)]


def measure(
    table: Sequence[float | None],
    label: Label = BASE,
    *,
    prompts: int = 8,
    version: int = 0,
    scorer: PolicyScorer | None = None,
    reference: Path | None = None,
) -> Evaluation:
    policy = engine()
    policy.version = version
    return evaluate(
        Measurers(policy, FakeRewards(table), trainer(policy), scorer or Uniform()),
        two_tasks(prompts),
        Draws(seed=1, completions=4, max_new_tokens=1, version=version),
        Against({"a"}, reference),
        label,
    )


def test_an_evaluation_without_a_single_reward_of_a_task_stops_the_run_with_the_reason_once() -> None:
    with pytest.raises(
        RunStopped, match=r"^evaluation of base at step 0: all 16 rewards of task 'a' failed: no judge$"
    ):
        measure((None,) * ANSWERS)
    with pytest.raises(
        RunStopped, match=r"^evaluation of frpo after crafts at step 25: all 16 rewards of task 'a' failed"
    ):
        measure((None,) * ANSWERS, Label("frpo", "crafts"), version=25)


def test_rewards_that_fail_in_part_are_left_out_and_counted() -> None:
    found = measure((1.0, None, None, None, None, None))
    assert all(t.failed > 0 and t.reward.mean == 1.0 for t in found.rewards)
    assert "NaN" not in found.model_dump_json()


class Broken:
    """Scorer of a policy whose weights hold NaN."""

    def submit(self, policy: Path, groups: Sequence[Group]) -> Now:
        return Now([tuple(np.full(1, np.nan, np.float32) for _ in g.completions) for g in groups])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_evaluation_never_holds_a_number_that_is_none() -> None:
    with pytest.raises(
        RunStopped,
        match=r"evaluation of base at step 0: the held-out loss is nan: "
        "the policy gives log-probs that are none",
    ):
        measure(TABLE, Label("base", downstream_loss=float("nan")))
    with pytest.raises(
        RunStopped,
        match=r"evaluation of base at step 0: the reward of task 'a' is inf: rewards are too large to add up",
    ):
        measure((1e308,) * ANSWERS)
    with pytest.raises(RunStopped, match=r"evaluation of x at step 0: the KL to the reference is nan"):
        measure(TABLE, Label("x"), scorer=Broken(), reference=Path("reference"))


def test_a_single_prompt_gives_no_interval() -> None:
    found = measure(TABLE, prompts=2, reference=Path("reference"))
    for task in found.rewards:
        assert (task.num_prompts, task.reward.se, task.reward.half) == (1, None, None)
    assert found.kl_reference is not None
    assert found.kl_reference.se is None
    assert Evaluation.model_validate_json(found.model_dump_json()) == found
    assert estimate_mean([0.0, 1.0]).se == pytest.approx(0.5)


def certifying(**fields: object) -> Config:
    return config().model_copy(
        update={
            "certify": CertifyConfig.model_validate(
                {"completions_per_prompt": 64, "radii": (0.1, 0.5), **fields}
            )
        }
    )


def test_a_certificate_lies_below_the_truth_and_knows_its_arms_radius() -> None:
    policy = engine()
    p = torch.softmax(policy.logits, 0).double().numpy()
    objective = ObjectiveConfig(estimator=FrpoEstimator(lam=0.5))
    a, b = make_certificates(policy, FakeRewards(TABLE), two_tasks(40), certifying(), objective)
    assert (a.task, b.task) == ("a", "b")
    population = np.repeat(TABLE, np.round(p * 10_000).astype(int))[None]
    for i, radius in enumerate(a.radii):
        truth = worst_case_reward(population, radius)
        assert a.certified[i] < truth
        assert a.certified[i] > truth - 0.15
        assert a.plug_in[i] == pytest.approx(truth, abs=0.05)
        assert a.lo[i] < a.plug_in[i] < a.hi[i]
    assert a.radius == pytest.approx(tilt_to(population, 0.5)[1], abs=0.02)
    assert np.array(a.rewards).shape == (20, 64)
    given = make_certificates(
        policy,
        FakeRewards(TABLE),
        two_tasks(4),
        certifying(),
        ObjectiveConfig(estimator=FrpoEstimator(rho=0.3)),
    )[0]
    assert given.radius == 0.3
    assert (
        make_certificates(
            policy, FakeRewards(TABLE), two_tasks(4), certifying(), ObjectiveConfig(estimator=GrpoEstimator())
        )[0].radius
        is None
    )


def test_a_failed_reward_counts_as_the_floor_of_the_certificate() -> None:
    scored = [[Reward(1.0, {}), Reward(None, {}, "no judge")], [Reward(1.0, {}), Reward(0.5, {})]]
    found = make_certificate("t", scored, CertifyConfig(floor=0.25, radii=(0.1,)), None, 0)
    assert found.rewards == ((1.0, 0.25), (1.0, 0.5))
    assert found.failed == 1
    with pytest.raises(ConfigError, match=r"certify.floor: 0.75 is above a reward of 0.5"):
        make_certificate("t", scored[1:], CertifyConfig(floor=0.75, radii=(0.1,)), None, 0)


def test_a_certificate_of_failed_rewards_alone_stops_the_run() -> None:
    with pytest.raises(RunStopped, match=r"certificate: all 1280 rewards of task 'a' failed: no judge"):
        make_certificates(engine(), FakeRewards((None,) * ANSWERS), two_tasks(40), certifying(), None)


def test_the_opposite_of_a_failed_reward_has_failed() -> None:
    group = next(iter(engine().generate(two_tasks(1), [3], Sampling(16, 1), 0)))
    pending = Opposite(FakeRewards((1.0, 0.8, 0.5, 0.3, None, None))).score(group)
    assert pending.ready()
    for turned, plain in zip(
        pending.result(), FakeRewards((1.0, 0.8, 0.5, 0.3, None, None)).score(group).result(), strict=True
    ):
        assert turned.total == (None if plain.total is None else -plain.total)
        assert turned.parts == plain.parts
        assert turned.error == plain.error
