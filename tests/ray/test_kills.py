"""Every kind of actor killed in the middle of a run, and the run stopped: the final weights are those of the
undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from frpo.disk import sha256_of_folder
from frpo.metrics import read_steps
from frpo.records import StageResult
from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = (
    *runs.SHORT,
    *runs.ONE_ARM,
    "learner.num_steps=60",
    "checkpoint.every=10",
    "evaluate.validate_every=25",
)

AHEAD = ("rollout.staleness=2",)


def worker(process: subprocess.Popen[str], name: str, ranks: int = 1) -> psutil.Process:
    """The last actor of this run (and of no other) by its class."""
    actors = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if p.cmdline() and p.cmdline()[0].startswith(f"ray::{name}")
    ]
    assert len(actors) == ranks, actors
    return actors[-1]


def digest(folder: Path) -> str:
    result = StageResult.model_validate_json((folder / "rlhf" / "frpo" / "done.json").read_text())
    assert result.arm is not None
    assert result.arm.weights_sha256 == sha256_of_folder(folder / "rlhf" / "frpo" / "policy")
    assert_every_step_is_there_once(folder)
    return result.arm.weights_sha256


def assert_every_step_is_there_once(folder: Path) -> None:
    rows = read_steps(folder, "rlhf/frpo")
    assert [row.step for row in rows] == list(range(1, 61))
    assert {row.batch.num_prompts for row in rows} == {6}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    runs.run(folder, *SETTINGS)
    return digest(folder)


def start_and_wait(folder: Path, steps: int = 13, settings: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    process = runs.start(folder, *SETTINGS, *settings)
    runs.wait_for(lambda: len(read_steps(folder, "rlhf/frpo")) >= steps, process)
    return process


@pytest.mark.parametrize("name", ["RolloutWorker", "RewardWorker", "ReferenceWorker"])
def test_a_killed_actor_is_restarted_within_the_run(undisturbed: str, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    process = start_and_wait(folder)
    victim = worker(process, name)
    os.kill(victim.pid, signal.SIGKILL)
    assert len(read_steps(folder, "rlhf/frpo")) < 60, "killed too late to count"
    assert process.wait(300) == 0, folder.with_suffix(".out").read_text()[-3000:]
    assert digest(folder) == undisturbed


def test_a_killed_learner_is_replaced_within_the_run_as_often_as_actors_may_be_restarted(
    undisturbed: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start_and_wait(folder)
    os.kill(worker(process, "LearnerWorker").pid, signal.SIGKILL)
    assert process.wait(300) == 0, folder.with_suffix(".out").read_text()[-3000:]
    text = folder.with_suffix(".out").read_text()
    assert "rlhf/frpo: learner worker 0 died during" in text
    assert "rlhf/frpo: goes on after step 10 of 60" in text
    assert digest(folder) == undisturbed


def test_a_learner_that_may_not_be_replaced_ends_the_run_with_one_paragraph_and_it_resumes(
    undisturbed: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start_and_wait(folder, settings=("cluster.max_restarts=0",))
    os.kill(worker(process, "LearnerWorker").pid, signal.SIGKILL)
    assert process.wait(120) == 1
    text = folder.with_suffix(".out").read_text()
    assert re.search(r"The run stopped \(rlhf/frpo, after step \d+\): A rank of the learner died", text)
    assert f"Resume with: python -m frpo run {runs.ROOT / 'recipes/testbed.yaml'} --run-dir {folder}" in text
    assert "Traceback" not in text
    assert "goes on after step" in runs.run(folder, *SETTINGS)
    assert digest(folder) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_stopped_driver_resumes(undisturbed: str, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = start_and_wait(folder, steps=23)
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert "Stopped. Resume with: python -m frpo run" in folder.with_suffix(".out").read_text()
    assert "goes on after step 20 of 60" in runs.run(folder, *SETTINGS)
    assert digest(folder) == undisturbed


def test_one_of_two_ranks_is_replaced_within_the_run(tmp_path: Path) -> None:
    settings = ("learner.num_workers=2",)
    runs.run(tmp_path / "undisturbed", *SETTINGS, *settings)
    folder = tmp_path / "run"
    process = start_and_wait(folder, settings=settings)
    os.kill(worker(process, "LearnerWorker", ranks=2).pid, signal.SIGKILL)
    assert process.wait(300) == 0, folder.with_suffix(".out").read_text()[-3000:]
    assert "rlhf/frpo: goes on after step 10 of 60" in folder.with_suffix(".out").read_text()
    assert digest(folder) == digest(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["RolloutWorker", "RewardWorker", "LearnerWorker"])
def test_a_run_ahead_of_its_learner_goes_on_whoever_is_killed(tmp_path: Path, name: str) -> None:
    """What is under way in the engines is drawn again, or was saved with the weights."""
    folder = tmp_path / "run"
    process = start_and_wait(folder, settings=AHEAD)
    os.kill(worker(process, name).pid, signal.SIGKILL)
    assert process.wait(300) == 0, folder.with_suffix(".out").read_text()[-3000:]
    assert_every_step_is_there_once(folder)


def test_a_driver_ahead_of_its_learner_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_and_wait(folder, steps=23, settings=AHEAD)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert "goes on after step 20 of 60" in runs.run(folder, *SETTINGS, *AHEAD)
    assert_every_step_is_there_once(folder)
    assert max(row.batch.max_staleness for row in read_steps(folder, "rlhf/frpo")) == 2
