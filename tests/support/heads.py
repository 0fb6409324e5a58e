"""A Ray head of a test's own, as an operator starts it: with a dashboard, job submission, metrics and token
authentication."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import runs
from tests.support.runs import free_port

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    env: dict[str, str]
    metrics_port: int
    address: str
    """Of its GCS."""
    folder: Path
    """Its temporary folder."""

    def metrics(self) -> str:
        """What Prometheus would scrape."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    @contextmanager
    def watched(self) -> Iterator[set[str]]:
        """Collects the names of all metrics of the rlhf stage that are served meanwhile: they go when their
        job ends."""
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
        return subprocess.run(
            [RAY, "job", *args], env=self.env, cwd=runs.ROOT, capture_output=True, text=True, timeout=timeout
        )


@contextmanager
def started(folder: Path) -> Iterator[Head]:
    """A head with ports, temporary folder and token of its own. Ended by its pid."""
    dashboard, port = free_port(), free_port()
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "FRPO_"))}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_metrics_report_interval_ms": "1000",
    }
    temporary = Path("/tmp") / f"frpo-head-{port}"  # Ray's sockets need a short path
    metrics = free_port()
    ports = [
        f"--metrics-export-port={metrics}",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        *ports,
        "--num-cpus=4",
        "--object-store-memory=400000000",
        f"--temp-dir={temporary}",
    ]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    head, process = Head(env, metrics, f"127.0.0.1:{port}", temporary), start()
    try:
        deadline = time.monotonic() + 600
        while not head.ready():
            assert time.monotonic() < deadline, "the head did not answer"
            if (
                process.poll() is not None
            ):  # on a busy machine its parts can take longer than the limits that it sets itself
                process = start()
            time.sleep(1)
        yield head
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
