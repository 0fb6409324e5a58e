"""Runs `frpo run` or `frpo sweep` as a user does, in a process of its own, on a shortened testbed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from frpo.resources import count_gpus

ROOT = Path(__file__).parents[2]

SHORT = (
    "base.num_steps=60",
    "rollout.prompts_per_step=6",
    "learner.num_steps=6",
    "checkpoint.every=2",
    "evaluate.completions_per_prompt=2",
    "evaluate.validate_every=4",
    "rollout.parity_every=3",
)
ONE_ARM = ("arms=[{name: frpo, objective: {estimator: {lam: 0.5}, beta: 0.3, penalty: k3}}]", "downstream=[]")


def command(
    folder: Path, *settings: str, verb: Sequence[str] = ("run",), recipe: str = "recipes/testbed.yaml"
) -> list[str]:
    return [
        sys.executable,
        "-m",
        "frpo",
        verb[0],
        str(ROOT / recipe),
        *verb[1:],
        "--run-dir",
        str(folder),
        *options_of(settings),
    ]


def options_of(settings: Sequence[str]) -> list[str]:
    """--set before each of them."""
    return list(chain.from_iterable(("--set", setting) for setting in settings))


def start(folder: Path, *settings: str, verb: Sequence[str] = ("run",)) -> subprocess.Popen[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".out").open("a")
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        command(folder, *settings, verb=verb),
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=env,
    )


def run(folder: Path, *settings: str, verb: Sequence[str] = ("run",), timeout_s: float = 400) -> str:
    """Run to the end; returns what it printed. Fails the test with that text when the exit code is not 0."""
    process = start(folder, *settings, verb=verb)
    try:
        code = process.wait(timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
    text = folder.with_suffix(".out").read_text()
    assert code == 0, text[-4000:]
    return text


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, (
            f"the run ended with {process.returncode} before what the test waits for"
        )
        assert time.monotonic() < deadline, "the run did not come to what the test waits for"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def replicas(deployment: str) -> list[psutil.Process]:
    """Processes of a deployment of the reward service."""
    name = f"ServeReplica:frpo-rewards:{deployment}"
    return [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]


def start_ray() -> None:
    """The Ray that the tests of actors share, in this process."""
    import ray

    options: dict[str, Any] = {
        "num_cpus": 6,
        "include_dashboard": False,
        "object_store_memory": 300 << 20,
        "log_to_driver": False,
    }
    if count_gpus() == 0:
        options["num_gpus"] = (
            8  # that Ray hands out though there are none: who would see which is tried with them
        )
    try:
        ray.init(address="local", **options)
    except Exception:  # a cold disk: Ray gives a node 30 s, and raises nothing more special
        ray.shutdown()
        ray.init(address="local", **options)
