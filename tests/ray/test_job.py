"""`ray job submit` against a head with token authentication: a run from submission to report, stopped and resubmitted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from frpo.metrics import read_steps
from tests.ray import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))
SETTINGS = (*runs.SHORT, *runs.ONE_ARM, "learner.num_steps=60", "checkpoint.every=10", "evaluate.validate_every=30")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    env: dict[str, str]
    metrics_port: int

    def metrics(self) -> str:
        """What Prometheus would scrape."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    @contextmanager
    def watched(self) -> Iterator[set[str]]:
        """Collects the names of all metrics of the rlhf stage that are served meanwhile: they go when their job ends."""
        seen, over = set[str](), threading.Event()

        def watch() -> None:
            while not over.wait(1):
                seen.update(re.findall(r'^(\w+){.*stage="rlhf/frpo".*} ', self.metrics(), re.MULTILINE))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join(15)

    def ready(self) -> bool:
        """Whether jobs are taken: the agent of the node, which starts them, serves the metrics too."""
        try:
            return bool(self.metrics()) and self.job("list").returncode == 0
        except OSError:
            return False

    def job(self, *args: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        return subprocess.run([RAY, "job", *args], env=self.env, cwd=runs.ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head of its own: ports, temporary folder and token. Ended by its pid."""
    dashboard = free_port()
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 4)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_metrics_report_interval_ms": "1000",
    }
    temporary = Path("/tmp") / f"frpo-job-{os.getpid()}"  # Ray's sockets need a short path
    metrics = free_port()
    ports = [
        f"--metrics-export-port={metrics}",
        f"--port={free_port()}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    command = [RAY, "start", "--head", "--block", *ports, "--num-cpus=4", "--object-store-memory=400000000", f"--temp-dir={temporary}"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    found, process = Head(env, metrics), start()
    try:
        deadline = time.monotonic() + 300
        while not found.ready():
            assert time.monotonic() < deadline, "the head did not answer"
            if process.poll() is not None:  # on a busy machine its parts can take longer than the limits that it sets itself
                process = start()
            time.sleep(1)
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def submission(folder: Path, name: str) -> list[str]:
    runtime = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30", "OMP_NUM_THREADS": "1"}}'
    command = [sys.executable, "-m", "frpo", "run", "recipes/testbed.yaml", "--run-dir", str(folder)]
    command += [word for s in SETTINGS for word in ("--set", s)]
    return ["submit", "--working-dir", ".", "--submission-id", name, "--runtime-env-json", runtime, "--", *command]


def test_submit_stop_resubmit(head: Head, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    args = submission(folder, "first")
    deadline = time.monotonic() + 400
    while (done := head.job(*args[:1], "--no-wait", *args[1:])).returncode != 0:
        assert "No available agent" in done.stderr, done.stderr[-3000:]  # the node's agent starts after the head answers
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
    stranger = Head({**head.env, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}, head.metrics_port)
    (tmp_path / "other").write_text("f" * 64)
    done = stranger.job("list")
    assert done.returncode != 0
