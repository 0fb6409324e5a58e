"""`ray job submit` against a head with token authentication: a run from submission to report, stopped and
resubmitted."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from frpo.metrics import read_steps
from tests.support import runs
from tests.support.heads import Head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = (
    *runs.SHORT,
    *runs.ONE_ARM,
    "learner.num_steps=60",
    "checkpoint.every=10",
    "evaluate.validate_every=30",
)


def submission(folder: Path, name: str) -> list[str]:
    runtime = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30", "OMP_NUM_THREADS": "1"}}'
    command = [sys.executable, "-m", "frpo", "run", "recipes/testbed.yaml", "--run-dir", str(folder)]
    command += runs.options_of(SETTINGS)
    return [
        "submit",
        "--working-dir",
        ".",
        "--submission-id",
        name,
        "--runtime-env-json",
        runtime,
        "--",
        *command,
    ]


def test_submit_stop_resubmit(head: Head, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    args = submission(folder, "first")
    deadline = time.monotonic() + 400
    while (done := head.job(*args[:1], "--no-wait", *args[1:])).returncode != 0:
        assert "No available agent" in done.stderr, done.stderr[
            -3000:
        ]  # the node's agent starts after the head answers
        assert time.monotonic() < deadline
    while len(read_steps(folder, "rlhf/frpo")) < 13:
        assert time.monotonic() < deadline, head.job("logs", "first").stdout[-3000:]
        time.sleep(0.2)
    head.job("stop", "first")
    logs = head.job("logs", "first").stdout
    assert "Stopped. Resume with:" in logs
    assert not (folder / "report.html").exists()
    with head.watched() as seen:
        done = head.job(*submission(folder, "second"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "goes on after step" in done.stdout
    assert "succeeded" in done.stdout
    assert [r.step for r in read_steps(folder, "rlhf/frpo")] == list(range(1, 61))
    assert (folder / "report.html").is_file()
    for name in (
        "reward",
        "kl",
        "entropy",
        "length",
        "cut_share",
        "equal_groups",
        "mismatch_kl",
        "waiting_rewards",
        "num_tokens_total",
        "generate_s_total",
    ):
        assert f"ray_frpo_{name}" in seen, sorted(n for n in seen if n.startswith("ray_frpo"))


def test_without_the_token_nothing_is_accepted(head: Head, tmp_path: Path) -> None:
    stranger = replace(head, env={**head.env, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")})
    (tmp_path / "other").write_text("f" * 64)
    done = stranger.job("list")
    assert done.returncode != 0
