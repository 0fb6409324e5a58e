"""Whole runs in other shapes: two ranks and two engines over a process group, LoRA, RLOO, several updates per
batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frpo import testbed
from frpo.metrics import read_steps
from frpo.records import StageResult
from frpo.rows import read_rows
from tests.support import runs
from tests.support.harness import TASK

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_two_ranks_two_engines_over_a_process_group(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wide = (
        "learner.num_workers=2",
        "learner.zero_stage=2",
        "rollout.num_workers=2",
        "rollout.num_cpus=0.3",
        "reward.num_workers=2",
        "reference.num_cpus=0.1",
        "reward.num_cpus=0.1",
        "evaluate.num_cpus=0.1",
        "rollout.transport=process_group",
        "rollout.parity_every=2",
    )
    runs.run(folder, *runs.SHORT, *wide, *runs.ONE_ARM, timeout_s=700)
    rows = read_steps(folder, "rlhf/frpo")
    assert [r.step for r in rows] == list(range(1, 7))
    assert max(r.update.mismatch_kl for r in rows) < 1e-6


def test_lora_several_updates_and_downstream_of_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = (
        "model.lora={rank: 4, alpha: 8}",
        "learner.updates_per_batch=2",
        "learner.learning_rate=1.0e-2",
        "objective.cut=mask",
        "arms=[{name: rloo, objective: {estimator: {kind: rloo}, beta: 0.0}}, "
        "{name: std, objective: {estimator: {kind: grpo, normalize_std: true}, beta: 0.1}}]",
        "downstream.1.num_steps=6",
        "downstream.1.marks=[]",
        "downstream.0.num_steps=4",
        "downstream.0.marks=[]",
    )
    runs.run(folder, *runs.SHORT, *settings, timeout_s=700)
    assert (folder / "rlhf" / "rloo" / "policy" / "adapter_config.json").is_file()
    assert not (folder / "downstream" / "rloo" / "crafts-harsh" / "policy" / "adapter_config.json").exists()
    rows = read_steps(folder, "rlhf/rloo")
    assert all(r.update.kl is None for r in rows)
    assert max(r.update.mismatch_kl for r in rows) < 1e-6
    result = StageResult.model_validate_json(
        (folder / "downstream" / "rloo" / "crafts-harsh" / "done.json").read_text()
    )
    start = result.evaluations[0].kl_policy
    assert start is not None
    assert abs(start.mean) < 1e-3  # the merged adapter is the arm's policy


def test_fine_tunes_that_are_defended_with_adapters_of_their_own(tmp_path: Path) -> None:
    """Engines that serve the arm's adapter of rank 2 run a fine-tune of all weights, and one of rank 8."""
    folder = tmp_path / "run"
    settings = (
        "model.lora={rank: 2, alpha: 4}",
        "downstream.0.lora=null",
        "downstream.0.replay=0.25",
        "downstream.0.kl_to_policy=0.1",
        "downstream.0.num_steps=4",
        "downstream.0.marks=[2]",
        "downstream.1.lora={rank: 8}",
        "downstream.1.interpolate=[0.5, 0.9]",
        "downstream.1.num_steps=6",
        "downstream.1.marks=[]",
    )
    runs.run(folder, *runs.SHORT, *settings, *runs.ONE_ARM[:1], timeout_s=700)
    results = []
    for name in ("crafts-gentle", "crafts-harsh"):
        stage = folder / "downstream" / "frpo" / name
        assert not (stage / "policy" / "adapter_config.json").exists()
        results.append(StageResult.model_validate_json((stage / "done.json").read_text()))
        start = results[-1].evaluations[0].kl_policy
        assert start is not None
        assert abs(start.mean) < 1e-3
    assert (folder / "downstream" / "frpo" / "crafts-gentle" / "own.safetensors").is_file()
    trained = [row for row in read_rows(folder) if row["kind"] == "finetune"]
    rows = [row for row in trained if row["stage"] != "base"]
    assert [row["kl"] is not None for row in rows] == [True] * 4 + [False] * 6
    assert rows[0]["kl"] < 1e-6 < rows[3]["kl"]
    way = results[1].interpolation
    assert way is not None
    assert way.shares == (0.0, 0.5, 0.9, 1.0)
    assert results[1].evaluations[-1].downstream_loss == way.losses[way.shares.index(way.share)]


GREEDY = """generation_kwargs: {until: [], do_sample: false, max_gen_toks: 7}
metric_list: [{metric: exact_match}]
"""


def test_radius_mode_certificate_attack_benchmarks_and_rl_downstream(tmp_path: Path) -> None:
    """A run stopped nowhere: what each stage leaves, that the attack lowers the reward where it was told to
    go, and that lm-evaluation-harness finds what the run's own evaluation finds."""
    folder = tmp_path / "run"
    rows = [{"prompt": i.prompt, "answer": i.answer[0]} for i in testbed.harmless_items() if i.heldout]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK % (tmp_path / "rows.jsonl") + GREEDY)
    settings = (
        "base.num_steps=300",
        "rollout.prompts_per_step=12",
        "learner.num_steps=30",
        "evaluate.completions_per_prompt=8",
        "arms=[{name: radius, objective: {estimator: {rho: 0.3}, target_kl: 0.5, beta: 0.3, "
        "penalty: reverse}}]",
        "downstream=[{kind: rl, name: more, data: [{path: 'testbed:prompts', task_column: task}], learner: "
        "{num_steps: 6}, marks: [3]}]",
        "certify={completions_per_prompt: 32, radii: [0.1, 0.5, 1.0]}",
        "attack={radii: [1.0], num_steps: 40}",
        f"harness={{tasks: [{tmp_path / 'task.yaml'}], max_tokens: 17}}",
    )
    runs.run(folder, *runs.SHORT, *settings, timeout_s=800)
    results = {
        p.parent.relative_to(folder).as_posix(): StageResult.model_validate_json(p.read_text())
        for p in folder.glob("**/done.json")
    }
    assert sorted(results) == [
        "attack/radius/1",
        "base",
        "certify/radius",
        "downstream/radius/more",
        "harness/base",
        "harness/radius",
        "harness/radius/more",
        "rlhf/radius",
    ]
    greedy = {name: r.scores[0].value for name, r in results.items() if name.startswith("harness/")}
    sampled = next(
        t.reward.mean for t in results["rlhf/radius"].evaluations[0].rewards if t.task == "harmless"
    )
    assert all(
        r.scores[0].num_examples == len(rows) for name, r in results.items() if name.startswith("harness/")
    )
    assert 0.5 < greedy["harness/base"] < greedy["harness/radius"] + 0.1
    assert sampled < greedy["harness/radius"] + 0.05  # the mode answers at least as often as a draw
    steps = read_steps(folder, "rlhf/radius")
    assert all(r.batch.lam and r.batch.radius is not None and r.batch.effective_samples for r in steps)
    assert len({r.batch.beta for r in steps}) == 30
    assert {c.task for c in results["certify/radius"].certificates} == {"harmful", "harmless"}
    assert all(len(c.rewards[0]) == 32 and c.radius == 0.3 for c in results["certify/radius"].certificates)
    assert [e.step for e in results["downstream/radius/more"].evaluations] == [0, 3, 6]
    before = {t.task: t.reward.mean for t in results["rlhf/radius"].evaluations[0].rewards}
    after = results["attack/radius/1"].evaluations[-1]
    assert all(
        t.reward.mean < before[t.task] - 0.1 for t in after.rewards if t.task in ("harmful", "harmless")
    )
    assert after.kl_policy is not None
    assert 0.4 < after.kl_policy.mean < 2.0
    page = (folder / "report.html").read_text()
    assert "Certified reward on" in page
    assert "By lm-evaluation-harness" in page
