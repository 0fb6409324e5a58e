"""One whole run on the real engines, all stages, and one kill of the driver."""

from __future__ import annotations

import json
import signal
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frpo.disk import sha256_of_folder
from frpo.metrics import read_steps
from frpo.records import StageResult
from tests.support import runs

SHORT = (*runs.SHORT, "base.num_steps=20")
TWO_ARMS = (
    "arms=[{name: grpo, objective: {estimator: {kind: grpo}, beta: 0.1, penalty: k3}}, "
    "{name: frpo, objective: {estimator: {lam: 0.5}, beta: 0.6}}]",
    "downstream.1.num_steps=10",
    "downstream.1.marks=[5]",
    "downstream.0.num_steps=4",
    "downstream.0.marks=[]",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    runs.run(folder, *SHORT, *TWO_ARMS)
    return folder


@pytest.mark.timeout(600)
def test_every_stage_leaves_its_result(whole: Path) -> None:
    done = [StageResult.model_validate_json(path.read_text()) for path in whole.glob("**/done.json")]
    results = {result.stage: result for result in done}
    assert sorted(results) == [
        "base",
        *(f"downstream/{arm}/crafts-{rate}" for arm, rate in product(("frpo", "grpo"), ("gentle", "harsh"))),
        "rlhf/frpo",
        "rlhf/grpo",
    ]
    assert [e.step for e in results["downstream/frpo/crafts-harsh"].evaluations] == [0, 5, 10]
    summary = results["rlhf/frpo"].arm
    assert summary is not None
    assert (summary.num_steps, summary.num_prompts, summary.num_completions, summary.failed_rewards) == (
        6,
        36,
        288,
        0,
    )
    assert summary.weights_sha256 == sha256_of_folder(whole / "rlhf" / "frpo" / "policy")
    before, after = (
        results["rlhf/frpo"].evaluations[0],
        results["downstream/frpo/crafts-harsh"].evaluations[-1],
    )
    assert before.kl_reference is not None
    assert after.kl_policy is not None
    start = results["downstream/frpo/crafts-harsh"].evaluations[0]
    assert start.kl_policy is not None
    assert abs(start.kl_policy.mean) < 1e-3
    assert after.downstream_loss is not None
    assert start.downstream_loss is not None
    assert after.downstream_loss < start.downstream_loss


def test_metrics_have_each_step_once_and_the_engines_agree(whole: Path) -> None:
    for arm in ("grpo", "frpo"):
        rows = read_steps(whole, f"rlhf/{arm}")
        assert [r.step for r in rows] == list(range(1, 7))
        assert max(r.update.mismatch_kl for r in rows) < 1e-6
        updates = [row.update for row in rows]
        assert all(u.kl is not None and np.isfinite(u.loss) and u.grad_norm > 0 for u in updates)
        assert updates[0].kl == pytest.approx(0, abs=1e-3)


def test_the_report_is_made_from_the_run(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    page = (whole / "report.html").read_text()
    assert "one seed" in page.lower()
    assert "grpo" in page
    assert "frpo" in page
    assert [arm["name"] for arm in report["arms"]] == ["grpo", "frpo"]
    assert report["training"][1]["steps"] == [1, 2, 3, 4, 5, 6]


def test_final_policies_load_directly(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for policy in (
        whole / "rlhf" / "frpo" / "policy",
        whole / "downstream" / "frpo" / "crafts-harsh" / "policy",
    ):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
        assert model.num_parameters() == 94_528
        assert tokenizer("how do i break the lock")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.timeout(300)
def test_the_verdicts_three_lines_load_the_policy(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    loaded: dict[str, Any] = {}
    exec(report["verdict"]["load"], loaded)
    assert f"rlhf/{report['verdict']['arm']}/policy" in loaded["tokenizer"].name_or_path
    assert loaded["model"].num_parameters() > 0


def test_a_finished_run_says_so(whole: Path) -> None:
    text = runs.run(whole, *SHORT, *TWO_ARMS)
    assert "Finished already" in text.splitlines()[-2] or "Finished already" in text


@pytest.mark.timeout(600)
def test_a_driver_killed_in_the_middle_ends_in_the_same_weights(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    settings = (
        *SHORT,
        runs.ONE_ARM[1],
        "arms=[{name: frpo, objective: {estimator: {lam: 0.5}, beta: 0.6}}]",
    )
    process = runs.start(folder, *settings)
    runs.wait_for(
        lambda: (folder / "metrics.jsonl").exists() and len(read_steps(folder, "rlhf/frpo")) >= 3, process
    )
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not (folder / "rlhf" / "frpo" / "done.json").exists()
    text = runs.run(folder, *settings)
    assert "goes on after step 2 of 6" in text or "goes on after step 4 of 6" in text
    assert sha256_of_folder(folder / "rlhf" / "frpo" / "policy") == sha256_of_folder(
        whole / "rlhf" / "frpo" / "policy"
    )
    assert [r.step for r in read_steps(folder, "rlhf/frpo")] == list(range(1, 7))


@pytest.mark.slow
def test_a_base_without_a_single_reward_stops_the_run_and_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def broken(completions, **columns):\n    raise RuntimeError('the judge is out')\n"
    )
    reward = f"rewards=[{{kind: function, name: judge, function: '{tmp_path}/r.py:broken'}}]"
    process = runs.start(tmp_path / "run", *SHORT, *runs.ONE_ARM, "base=null", reward)
    assert process.wait(400) == 1
    said = (tmp_path / "run.out").read_text()
    assert (
        "evaluation of base at step 0: all 72 rewards of task 'downstream' failed: judge: RuntimeError: the "
        "judge is out" in said
    )
    assert said.count("the judge is out") == 1
    assert "Resume with:" in said
    assert not (tmp_path / "run" / "base" / "done.json").exists()
