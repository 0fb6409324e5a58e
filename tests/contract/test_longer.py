"""A stage that goes on to more steps ends where one with as many from the start ends; on fakes, without
Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from frpo.config import Config
from frpo.metrics import RunLog, read_rows, read_steps
from frpo.records import StageResult
from frpo.stages.folders import look_and_tell, look_at_stages, supersede
from frpo.stages.work import Work
from frpo.types import Prompt
from tests.support import fakes

PROMPTS = [Prompt(f"p:{i}", "?", np.array([9, i], np.int32), "only", {}) for i in range(8)]
REWARDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def configured(folder: Path, num_steps: int) -> Config:
    tree = fakes.config(estimator={"kind": "grpo"}, beta=0.0).model_dump(mode="json", exclude={"arms"})
    rl = {
        "kind": "rl",
        "name": "more",
        "data": [{"path": "nowhere.jsonl", "task": "only"}],
        "learner": {"num_steps": num_steps},
        "marks": [3],
    }
    steps = {"num_steps": num_steps, "num_workers": 1}
    more = {
        "run_dir": str(folder),
        "learner": steps,
        "arms": [{"name": "arm"}],
        "downstream": [rl],
        "checkpoint": {"every": 4},
    }
    return Config.model_validate({**tree, **more})


def run(config: Config) -> None:
    """What `frpo.stages.walk.run_stages` does, with partners that are fakes."""
    team = fakes.team(config, REWARDS)
    inputs = SimpleNamespace(train=PROMPTS, heldout=PROMPTS[:2], prompts=lambda field, sources: PROMPTS)
    with RunLog(config.folder, config) as log:
        standings = look_and_tell(config, log.note)
        log.boards = [SimpleNamespace(add=lambda *_: None, close=lambda: None)]  # type: ignore[list-item]
        supersede(config, standings, log)
        for standing in standings:
            if standing.state != "done":
                Work(config, team, log, inputs).do(standing)


def result(folder: Path, stage: str) -> StageResult:
    return StageResult.model_validate_json((folder / stage / "done.json").read_text())


@pytest.mark.parametrize("first", [5, 8])
def test_six_more_steps_end_where_all_at_once_end(first: int, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    run(configured(once, 12))
    for num_steps in (first, 12):
        run(configured(twice, num_steps))
    for stage in ("rlhf/arm", "downstream/arm/more"):
        assert (twice / stage / "policy/logits.npy").read_bytes() == (
            once / stage / "policy/logits.npy"
        ).read_bytes()
        rows = [
            [(r.step, r.batch.reward, r.update.loss) for r in read_steps(folder, stage)]
            for folder in (once, twice)
        ]
        assert rows[0] == rows[1]
        assert [r[0] for r in rows[0]] == list(range(1, 13))
        measured = [
            [(e.step, e.rewards) for e in result(folder, stage).evaluations] for folder in (once, twice)
        ]
        assert measured[0] == measured[1]
    summary, other = result(once, "rlhf/arm").arm, result(twice, "rlhf/arm").arm
    assert summary is not None
    assert other is not None
    assert (
        (summary.num_steps, summary.num_completions)
        == (other.num_steps, other.num_completions)
        == (12, 12 * 48)
    )
    (aside,) = (twice / "superseded").iterdir()
    assert (aside / "rlhf/arm/policy/logits.npy").exists()
    kept = [r["step"] for r in read_rows(aside) if r["stage"] == "rlhf/arm" and r["kind"] == "step"]
    assert kept == list(range(1, first + 1))
    assert all(s.state == "done" for s in look_at_stages(configured(twice, 12)))


def test_a_downstream_rl_alone_goes_on_without_its_arm(tmp_path: Path) -> None:
    def longer(num_steps: int) -> Config:
        tree = configured(tmp_path, 6).model_dump(mode="json")
        tree["downstream"][0]["learner"]["num_steps"] = num_steps
        return Config.model_validate(tree)

    run(longer(6))
    arm = (tmp_path / "rlhf/arm/done.json").read_bytes()
    run(longer(10))
    assert (tmp_path / "rlhf/arm/done.json").read_bytes() == arm
    assert [e.step for e in result(tmp_path, "downstream/arm/more").evaluations] == [0, 3, 10]
    assert [r.step for r in read_steps(tmp_path, "downstream/arm/more")] == list(range(1, 11))
