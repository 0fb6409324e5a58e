"""Prometheus, as deploy/grafana configures it, against a live run: every query of the board and of the alerts
returns data."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from frpo.metrics import read_steps
from frpo.resources import count_gpus
from tests.support import runs
from tests.support.heads import Head

GRAFANA = runs.ROOT / "deploy" / "grafana"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus here; apt-get install prometheus"
)
SETTINGS = (
    *runs.SHORT,
    *runs.ONE_ARM,
    "learner.num_steps=4000",
    "checkpoint.every=1000",
    "evaluate.validate_every=1000",
    "rollout.parity_every=1000",
)


def board_module() -> Any:
    spec = importlib.util.spec_from_file_location("board", GRAFANA / "board.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["board"] = module
    spec.loader.exec_module(module)
    return module


def queries() -> list[str]:
    """All of the board, and what each alert compares."""
    board = json.loads((GRAFANA / "frpo.json").read_text())
    targets = chain.from_iterable(panel.get("targets", []) for panel in board["panels"])
    groups = yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"]
    alerts = chain.from_iterable(group["rules"] for group in groups)
    found = [target["expr"] for target in targets]
    found += [re.split(r" (?:==|>|<) ", a["expr"])[0] for a in alerts]
    return [q.replace("$run", ".*").replace("$__rate_interval", "30s") for q in found]


def test_the_board_is_what_its_builder_builds() -> None:
    assert json.loads(board_module().board_json()) == json.loads((GRAFANA / "frpo.json").read_text())
    assert len(queries()) >= 30


@needs_prometheus
def test_prometheus_takes_the_files(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        (tmp_path / name).write_text((GRAFANA / name).read_text())
    done = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 rules found" in done.stdout


@pytest.fixture
def live(head: Head, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run on the head that goes on for as long as the test looks at it."""
    env = head.env | {"OMP_NUM_THREADS": "1"}
    log = (tmp_path / "out").open("w")
    command = runs.command(tmp_path / "run", *SETTINGS, f"cluster.address={head.address}")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=runs.ROOT, env=env
    )
    runs.wait_for(lambda: len(read_steps(tmp_path / "run", "rlhf/frpo")) > 20, process)
    yield process
    process.terminate()
    process.wait(90)


@pytest.fixture
def prometheus(head: Head, tmp_path: Path) -> Iterator[str]:
    port = runs.free_port()
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    listed = Path(config["scrape_configs"][0]["file_sd_configs"][0]["files"][0]).name
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(head.folder / listed)]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "alerts.yml").write_text((GRAFANA / "alerts.yml").read_text())
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=(tmp_path / "prometheus.log").open("w")
    )
    yield f"http://127.0.0.1:{port}/api/v1"
    process.terminate()
    process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_prometheus
def test_every_query_returns_data(live: subprocess.Popen[str], prometheus: str) -> None:
    asked = [q for q in queries() if "gpus" not in q or count_gpus()]
    deadline, empty = time.monotonic() + 180, asked
    while empty:
        assert live.poll() is None
        assert time.monotonic() < deadline, empty
        time.sleep(3)
        try:
            answers = {
                q: httpx.get(f"{prometheus}/query", params={"query": q}, timeout=10).json() for q in empty
            }
        except httpx.HTTPError:
            continue
        assert all(a["status"] == "success" for a in answers.values()), answers
        empty = [q for q, a in answers.items() if not a["data"]["result"]]
    rules = httpx.get(f"{prometheus}/rules", timeout=10).json()["data"]["groups"][0]["rules"]
    assert {r["name"]: (r["state"], r["health"]) for r in rules} == {
        "StalledRun": ("inactive", "ok"),
        "MismatchKl": ("inactive", "ok"),
        "FailedRewards": ("inactive", "ok"),
        "RewardQueueFull": ("inactive", "ok"),
    }
