"""A sweep on the real engines: two seeds side by side, stopped in the middle, gone on with, finished."""

from __future__ import annotations

import signal
from itertools import product
from pathlib import Path

import pytest

from frpo.records import StageResult
from frpo.report.sweep import Sweep
from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SWEEP = ("sweep", "--seeds", "2")
SETTINGS = (
    *runs.SHORT, "objective.beta=[0.1, 0.3]",
    "arms=[{name: grpo, objective: {estimator: {kind: grpo}}}, "
    "{name: frpo, objective: {estimator: {lam: 0.5}}}]",
    "downstream.0.num_steps=6", "downstream.0.marks=[]", "downstream.1.num_steps=6", "downstream.1.marks=[3]",
)  # fmt: skip


def digest(seed: Path, arm: str) -> str:
    result = StageResult.model_validate_json((seed / "rlhf" / arm / "done.json").read_text())
    assert result.arm is not None
    return result.arm.weights_sha256


def test_a_sweep_runs_side_by_side_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    seeds = [folder / f"seed-{i:03d}" for i in range(2)]
    process = runs.start(folder, *SETTINGS, verb=SWEEP)
    runs.wait_for(lambda: all((s / "rlhf" / "grpo-beta0.1" / "done.json").exists() for s in seeds), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    before = [digest(s, "grpo-beta0.1") for s in seeds]
    assert not any((s / "report.json").exists() for s in seeds)

    said = runs.run(folder, *SETTINGS, verb=SWEEP, timeout_s=700)
    assert "Stopped. Resume with:" in said
    assert said.count("2 seeds to do, 2 at a time") == 2
    assert said.count("rlhf/grpo-beta0.1: finished before, skipped") == 2
    assert [digest(s, "grpo-beta0.1") for s in seeds] == before
    found = Sweep.model_validate_json((folder / "sweep.json").read_text())
    assert found.seeds == (0, 1)
    assert [a.arm for a in found.arms] == ["grpo-beta0.1", "grpo-beta0.3", "frpo-beta0.1", "frpo-beta0.3"]
    assert len({digest(seed, arm.arm) for seed, arm in product(seeds, found.arms)}) == 8
    assert all(len(a.kept) == 2 and a.kl.mean > 0 for a in found.arms)

    assert "seeds to do" not in runs.run(tmp_path / "sweep", *SETTINGS, verb=SWEEP)[len(said) :]
