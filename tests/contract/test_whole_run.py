"""Every kind of stage, done with fakes: what it stands on, when it measures, what it leaves. No Ray, no
engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frpo.outline import list_stages
from frpo.records import Evaluation, StageResult
from frpo.roles import RankDied
from frpo.rows import read_rows
from frpo.types import Group, RolloutBatch
from tests.support import fakes
from tests.support.whole import REWARDS, configured, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(configured(folder))
    return folder


def result(folder: Path, stage: str) -> StageResult:
    return StageResult.model_validate_json((folder / stage / "done.json").read_text())


def steps_of(evaluations: tuple[Evaluation, ...]) -> list[int]:
    return [evaluation.step for evaluation in evaluations]


def test_every_stage_of_the_outline_leaves_its_result(whole: Path) -> None:
    names = [stage.name for stage in list_stages(configured(whole))]
    assert names == [
        "base",
        "harness/base",
        "rlhf/arm",
        "harness/arm",
        "certify/arm",
        "downstream/arm/sft",
        "harness/arm/sft",
        "downstream/arm/rl",
        "harness/arm/rl",
        "attack/arm/0.5",
    ]
    assert [result(whole, name).stage for name in names] == names
    assert all(result(whole, name).seconds > 0 for name in names)


def test_an_arm_is_validated_on_its_way_and_evaluated_at_its_end(whole: Path) -> None:
    rows = [row for row in read_rows(whole) if row["stage"] == "rlhf/arm"]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [2, 4]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [6]
    rlhf = result(whole, "rlhf/arm")
    assert steps_of(rlhf.evaluations) == [0]  # of the arm itself, before any fine-tune
    assert rlhf.evaluations[0].kl_policy is None
    assert rlhf.evaluations[0].kl_reference is not None
    assert rlhf.arm is not None
    assert (rlhf.arm.num_steps, rlhf.arm.num_completions) == (6, 6 * 48)
    assert rlhf.arm.seconds == pytest.approx(sum(rlhf.arm.phase_seconds.values()))


def test_a_fine_tune_is_measured_at_its_marks_against_the_arm_it_began_from(whole: Path) -> None:
    sft = result(whole, "downstream/arm/sft")
    assert steps_of(sft.evaluations) == [0, 2, 4]
    losses = [evaluation.downstream_loss or 0.0 for evaluation in sft.evaluations]
    assert losses[0] > losses[1] > losses[2]  # of the last answer, which it learns
    divergences = [evaluation.kl_policy.mean for evaluation in sft.evaluations if evaluation.kl_policy]
    assert divergences[0] == 0.0  # nats from itself
    assert divergences[2] > divergences[1] > 0.0
    rewards = [evaluation.rewards[0].reward.mean for evaluation in sft.evaluations]
    assert rewards[2] < rewards[0]  # the last answer is worth nothing
    assert steps_of(result(whole, "downstream/arm/rl").evaluations) == [0, 1, 3]


def test_an_attack_lowers_the_reward_that_the_arm_was_trained_for(whole: Path) -> None:
    attack = result(whole, "attack/arm/0.5").evaluations
    assert steps_of(attack) == [2, 4]
    assert {evaluation.downstream for evaluation in attack} == {"attack 0.5"}
    before = result(whole, "rlhf/arm").evaluations[0].rewards[0].reward.mean
    assert attack[-1].rewards[0].reward.mean < before - 0.05


def test_a_certificate_is_drawn_from_the_arm_and_benchmarks_from_each_policy(whole: Path) -> None:
    (certificate,) = result(whole, "certify/arm").certificates
    assert np.array(certificate.rewards).shape == (2, 16)
    assert certificate.radius is not None
    shares = [result(whole, f"harness/{of}").scores[0].value or 0.0 for of in ("base", "arm", "arm/sft")]
    assert shares[1] > shares[0]  # of the best answer
    assert shares[2] < shares[1]


class Dying:
    """Scores no policy."""

    def submit(self, policy: Path, groups: list[Group]) -> fakes.Now:
        raise RuntimeError("evaluation worker 0 died")


class SlowWriter(fakes.FakeLearner):
    """Its checkpoints are written when somebody waits for them."""

    def save(self, folder: Path) -> fakes.Now:
        writing = super().save(folder)
        writing.ready = lambda: False  # type: ignore[method-assign]
        return writing


def test_a_stage_that_fails_while_it_measures_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    """The one that is being written then is finished before the failure reaches whoever ends the actors."""
    config = configured(
        tmp_path, base=None, harness=None, certify=None, attack=None, downstream=[], checkpoint={"every": 5}
    )
    team = fakes.team(config, REWARDS)
    learner = SlowWriter(config.objective)
    publisher = fakes.FakePublisher(learner, team.rollouts)  # type: ignore[arg-type]
    broken = replace(team, scorer=Dying(), learner=learner, learner_publisher=publisher)
    with pytest.raises(RuntimeError, match="evaluation worker 0 died"):
        run(config, broken)
    assert (tmp_path / "rlhf/arm/checkpoints/step-00000005").is_dir()
    run(config)
    assert steps_of(result(tmp_path, "rlhf/arm").evaluations) == [0]
    rows = [row["step"] for row in read_rows(tmp_path) if row["kind"] == "step"]
    assert rows == [1, 2, 3, 4, 5, 6]


class Mortal(fakes.FakeLearner):
    """Its rank dies once, at some update or when it is asked for log-probs; all that it held is lost."""

    update_that_dies = 0
    dies_in_scoring = False
    dies_in_reviving = False

    def revive(self) -> None:
        super().revive()
        if self.dies_in_reviving:
            self.dies_in_reviving = False
            raise RankDied("learner", "learner worker 0 died during join(): killed")

    def update(self, batch: RolloutBatch) -> fakes.Now:
        self.update_that_dies -= 1
        if self.update_that_dies == 0:
            raise RankDied("learner", "learner worker 1 died during update(): killed")
        return super().update(batch)

    def submit(self, groups: Sequence[Group]) -> fakes.Now:
        if self.dies_in_scoring:
            self.dies_in_scoring = False
            raise RankDied("learner", "learner worker 1 died during score(): killed")
        return super().submit(groups)


@pytest.mark.parametrize(
    ("dies", "again", "revived"),
    [
        ({"update_that_dies": 1}, [], 1),
        ({"update_that_dies": 4}, [3], 1),  # the checkpoint is of step 2
        ({"dies_in_scoring": True}, [5, 6], 1),  # at the end, while the arm is measured
        ({"update_that_dies": 4, "dies_in_reviving": True}, [3], 2),
    ],
)
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_rank_that_dies_is_replaced_within_the_run(
    tmp_path: Path, dies: dict[str, Any], again: list[int], revived: int, staleness: int
) -> None:
    """Training goes on from the last checkpoint; without staleness the policy is the undisturbed one."""
    settings: dict[str, Any] = {
        "base": None,
        "harness": None,
        "certify": None,
        "attack": None,
        "downstream": [],
    }
    settings["rollout"] = {**fakes.config().rollout.model_dump(mode="json"), "staleness": staleness}
    config = configured(tmp_path / "run", **settings)
    team = fakes.team(config, REWARDS)
    learner = Mortal(config.objective)
    learner.__dict__.update(dies)
    publisher = fakes.FakePublisher(learner, team.rollouts)  # type: ignore[arg-type]
    run(config, replace(team, learner=learner, learner_publisher=publisher))
    assert learner.revived == revived
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] in ("step", "validation", "evaluation")]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [2, 4]
    assert len(learner.seen) == 6 + len(again)
    if staleness == 0:
        undisturbed = configured(tmp_path / "undisturbed", **settings)
        run(undisturbed)
        policies = [(tmp_path / name / "rlhf/arm/policy/logits.npy") for name in ("run", "undisturbed")]
        assert policies[0].read_bytes() == policies[1].read_bytes()
