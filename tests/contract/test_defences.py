"""Fine-tunes that keep near the arm's policy, done with fakes: what they train on, also after a resume, and
which policy they leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from frpo.config import Config
from frpo.metrics import RunLog
from frpo.prompts import Examples
from frpo.records import StageResult
from frpo.roles import Team
from frpo.rows import read_rows
from frpo.stages.folders import look_and_tell
from frpo.stages.work import Work
from frpo.stats import FinetuneStats
from frpo.types import Anchor, Prompt, Sequences
from tests.support import fakes

PROMPTS = [Prompt(f"p:{i}", f"prompt {i}", np.array([9, i], np.int32), "only", {}) for i in range(8)]
REWARDS = (1.0, 0.8, None, 0.4, 0.2, 0.0)
LAST_ANSWER = Examples(((np.array([1, 1], np.int32), np.array([5], np.int32)),) * 4, ("only",) * 4)
DATA = [{"path": "nowhere.jsonl", "task": "only"}]
STAGE = "downstream/arm/sft"


def configure_run(folder: Path, **fields: Any) -> Config:
    tree = fakes.config(beta=0.0, estimator={"kind": "frpo", "lam": 0.5}).model_dump(mode="json")
    sft = {"name": "sft", "num_steps": 6, "batch_size": 4, "data": DATA, "heldout": DATA, **fields}
    asked = {
        "run_dir": str(folder),
        "learner": {"num_steps": 4, "num_workers": 1},
        "arms": [{"name": "arm"}],
        "downstream": [sft],
        "max_failed_rewards": 1.0,
        "checkpoint": {"every": 2},
    }
    return Config.model_validate({**tree, **asked})


def run_stages(config: Config, team: Team) -> Any:
    """What is not done yet; returns the fine-tune ranks."""
    inputs: Any = SimpleNamespace(train=PROMPTS, heldout=PROMPTS[:2], examples=lambda data: LAST_ANSWER)
    with RunLog(config.folder, config) as log:
        log.boards = [SimpleNamespace(add=lambda *_: None, close=lambda: None)]  # type: ignore[list-item]
        for standing in look_and_tell(config, log.note):
            if standing.state != "done":
                Work(config, team, log, inputs).do(standing)
    return team.finetune


def do_finetune(folder: Path, **fields: Any) -> tuple[list[tuple[Sequences, Anchor | None]], StageResult]:
    """The batches that a fine-tune trains on, and its result."""
    config = configure_run(folder, **fields)
    ranks = run_stages(config, fakes.team(config, REWARDS))
    return ranks.batches, StageResult.model_validate_json((folder / STAGE / "done.json").read_text())


def answers_in(sequences: Sequences) -> list[int]:
    return fakes.answers_of(sequences).tolist()


def test_a_share_of_each_batch_are_the_best_of_the_arms_own_completions(tmp_path: Path) -> None:
    batches, _ = do_finetune(tmp_path, replay=0.5)
    assert len(batches) == 6
    for sequences, anchor in batches:
        assert anchor is None
        assert answers_in(sequences)[:2] == [5, 5]  # of the task
        assert set(answers_in(sequences)[2:]) <= {0, 1}  # of 48 draws, whatever had no reward or a low one
        assert set(sequences.tokens[[6, 9]].tolist()) == {9}  # the run's prompts
    rows = [tuple(sequences.tokens[6:].tolist()) for sequences, _ in batches]
    assert len(set(rows)) > 3


def test_the_anchor_is_all_that_the_arm_drew_at_its_own_log_probs(tmp_path: Path) -> None:
    batches, _ = do_finetune(tmp_path, kl_to_policy=0.5)
    policy = fakes.saved_logits(tmp_path / "rlhf" / "arm" / "policy")
    seen = set()
    for sequences, anchor in batches:
        assert answers_in(sequences) == [5] * 4
        assert anchor is not None
        assert len(anchor.sequences) == 4
        truth = fakes.completion_logprobs(policy, anchor.sequences)
        np.testing.assert_array_equal(anchor.logprobs, truth)
        seen |= set(answers_in(anchor.sequences))
    assert 2 in seen  # without a reward
    rows = [row for row in read_rows(tmp_path) if row["kind"] == "finetune"]
    assert rows[0]["kl"] == 0.0
    assert rows[-1]["kl"] > 0.0


def test_a_fine_tune_that_is_pulled_to_the_policy_ends_nearer_to_it(tmp_path: Path) -> None:
    divergences = []
    for name, fields in (("plain", {}), ("near", {"kl_to_policy": 1.0}), ("mixed", {"replay": 0.5})):
        _, result = do_finetune(tmp_path / name, **fields)
        assert result.evaluations[-1].kl_policy is not None
        divergences.append(result.evaluations[-1].kl_policy.mean)
    assert divergences[0] > 1.5 * divergences[1]
    assert divergences[0] > 1.5 * divergences[2]


def test_without_a_defence_nothing_is_drawn_or_written(tmp_path: Path) -> None:
    batches, result = do_finetune(tmp_path)
    assert all(anchor is None and answers_in(sequences) == [5] * 4 for sequences, anchor in batches)
    assert result.interpolation is None
    assert not list((tmp_path / STAGE).glob("*own*"))
    assert [row["kl"] for row in read_rows(tmp_path) if row["kind"] == "finetune"] == [None] * 6


class Dying(fakes.FakeFinetuner):
    """Dies once, in the fourth update."""

    alive = False

    def update(self, sequences: Sequences, anchor: Anchor | None = None) -> FinetuneStats:  # type: ignore[override]
        if len(self.batches) == 3 and not self.alive:
            raise KeyboardInterrupt
        return super().update(sequences, anchor)


def test_a_resumed_fine_tune_trains_on_the_same_rows_to_the_same_bits(tmp_path: Path) -> None:
    fields = {"replay": 0.25, "kl_to_policy": 0.5, "interpolate": [0.5]}
    whole, result = do_finetune(tmp_path / "whole", **fields)
    config = configure_run(tmp_path / "cut", **fields)
    team = fakes.team(config, REWARDS)
    dying = Dying(config.objective)
    publisher = fakes.FakePublisher(dying, team.rollouts)  # type: ignore[arg-type]
    team = replace(team, finetune=dying, finetune_publisher=publisher)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, team)
    written = (tmp_path / "cut" / STAGE / "own.safetensors").stat().st_mtime_ns
    dying.alive = True
    team = replace(team, rewards=fakes.FakeRewards([0.0] * fakes.ANSWERS))  # they would choose other rows
    run_stages(config, team)
    assert (tmp_path / "cut" / STAGE / "own.safetensors").stat().st_mtime_ns == written
    again = [*dying.batches[:2], *dying.batches[3:]]  # the third was done after the last checkpoint
    for (examples, anchor), (others, other) in zip(whole, again, strict=True):
        assert anchor is not None
        assert other is not None
        np.testing.assert_array_equal(examples.tokens, others.tokens)
        np.testing.assert_array_equal(anchor.sequences.tokens, other.sequences.tokens)
        np.testing.assert_array_equal(anchor.logprobs, other.logprobs)
    ends = [fakes.saved_logits(tmp_path / name / STAGE / "policy") for name in ("whole", "cut")]
    assert ends[0].tolist() == ends[1].tolist()
    assert result.interpolation is not None


def test_the_policy_is_the_one_that_was_chosen_on_the_way_and_the_one_that_is_measured(
    tmp_path: Path,
) -> None:
    _, plain = do_finetune(tmp_path / "plain")
    _, result = do_finetune(tmp_path / "way", interpolate=[0.9, 0.2, 0.95])
    arm, end = (
        fakes.saved_logits(tmp_path / path)
        for path in ("way/rlhf/arm/policy", "plain/downstream/arm/sft/policy")
    )
    way = result.interpolation
    assert way is not None
    assert way.shares == (0.0, 0.2, 0.9, 0.95, 1.0)
    for share, loss in zip(way.shares, way.losses, strict=True):
        logits = arm + share * (end - arm)
        assert loss == pytest.approx(float(logits.logsumexp(0) - logits[5]), abs=1e-6)
    gain = way.losses[0] - way.losses[-1]
    kept = [(way.losses[0] - loss) / gain for loss in way.losses]
    assert kept[1] < 0.9 < kept[2]
    assert way.share == 0.9
    policy = fakes.saved_logits(tmp_path / "way" / STAGE / "policy")
    np.testing.assert_allclose(policy.numpy(), (arm + 0.9 * (end - arm)).numpy(), atol=1e-6)
    last = result.evaluations[-1]
    assert last.downstream_loss == way.losses[2]
    assert last.kl_policy is not None
    assert plain.evaluations[-1].kl_policy is not None
    assert 0 < last.kl_policy.mean < plain.evaluations[-1].kl_policy.mean
