"""Clusters that can't be joined, and machines on which Ray can't start: named soon, before anything waits for
Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frpo import doctor, joining
from frpo.config import ConfigError, find_cluster
from frpo.recipe import load_recipe
from frpo.resources import runs_elsewhere
from frpo.roles import WorkerFailed

ROOT = Path(__file__).parents[2]
SERVICE = str(ROOT / "deploy" / "rewards.yaml")


def test_the_recipe_names_the_cluster_before_the_job_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find_cluster(None) == ("10.0.0.1:6379", "RAY_ADDRESS")
    assert find_cluster("10.0.0.2:6379") == ("10.0.0.2:6379", "cluster.address")
    assert find_cluster("auto", "--address") == ("auto", "--address")


def test_an_address_of_nothing_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is started here then, so that this machine is what the plan has to fit."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    recipe = ROOT / "recipes" / "testbed.yaml"
    assert find_cluster(None) is None
    assert not runs_elsewhere(load_recipe(recipe))
    assert runs_elsewhere(load_recipe(recipe, ("cluster.address=10.0.0.2:6379",)))


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """A port of somebody else, who speaks HTTP/1.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    with server.accept()[0] as caller:
                        caller.recv(100)
                        caller.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def serve(*args: str, **env: str) -> tuple[int, str, float]:
    """Exit code, stderr, seconds."""
    began = time.monotonic()
    kept = {k: v for k, v in os.environ.items() if k != "FRPO_SERVICE_TOKEN"}
    command = [sys.executable, "-m", "frpo", "serve", SERVICE, *args]
    done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr, time.monotonic() - began


@pytest.mark.parametrize("kind", ["silent", "web"])
def test_what_gives_no_answer_of_a_head_is_named(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "PROBE_S", 1.0)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    address = request.getfixturevalue(kind)
    with pytest.raises(
        ConfigError,
        match=rf"^cluster\.address: {address} accepts connections and gives no answer of "
        r"a Ray head within 1 s",
    ):
        joining.join(address, 2**28)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "no connection (Connection refused)"),
        ("nowhere.invalid:6379", "no connection ("),
        ("127.0.0.1", "write host:port"),
        ("head:port", "write host:port"),
        ("127.0.0.1:99999", "write host:port"),
        ("ray://127.0.0.1:10001", "is Ray Client's address; give the GCS's"),
        ("http://127.0.0.1:8265", "is the dashboard's address; give the GCS's"),
        ("local", "write host:port"),
    ],
)
def test_an_address_that_is_none(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for field, given in (("cluster.address", address), ("RAY_ADDRESS", None)):
        if given is None:
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError) as error:
            joining.join(given, 2**28)
        assert str(error.value).startswith(f"{field}: {address}") or str(error.value).startswith(
            f"{field}: {address!r}"
        )
        assert said in str(error.value)
    finding = doctor.check_cluster(address)
    assert said in f"{finding.found}; {finding.remedy}"
    assert finding.remedy


@pytest.mark.long
def test_a_dead_cluster_is_named_within_seconds_by_the_command_line(tmp_path: Path) -> None:
    code, said, seconds = serve("--address", "127.0.0.1:9", FRPO_SERVICE_TOKEN="x")
    assert (code, said.partition(";")[0]) == (2, "--address: 127.0.0.1:9: no connection (Connection refused)")
    assert seconds < 10
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "frpo",
        "run",
        str(ROOT / "recipes" / "testbed.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    env = os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr.partition(";")[0]) == (
        2,
        "RAY_ADDRESS: 127.0.0.1:9: no connection (Connection refused)",
    )
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_missing_token_and_a_taken_port_are_found_before_ray_is_imported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said, seconds = serve("--set", f"port={port}")
        assert (code, said) == (
            2,
            f"port: {port} on 127.0.0.1 is taken; choose another, or stop who serves there\n",
        )
    code, said, _ = serve(RAY_ADDRESS="127.0.0.1:9")
    assert (code, said.partition(",")[0]) == (2, "token_env: FRPO_SERVICE_TOKEN is not set")
    assert seconds < 10  # 1 s on an idle machine; importing Ray's part alone takes longer


def test_ray_starts_under_a_short_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for name in ("TMPDIR", "RAY_TMPDIR"):
        short, long = tmp_path / "s", tmp_path / ("l" * 60)
        monkeypatch.setenv(name, str(long))
        assert joining.find_temporary_folder() == Path(f"/tmp/frpo-ray-{os.getuid()}")
        monkeypatch.setattr(joining, "SOCKET_PATH", len(str(short)) + 4 + joining.SESSION)
        monkeypatch.setenv(name, str(short))
        assert joining.find_temporary_folder() == short / "ray"
        monkeypatch.undo()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(
        ConfigError, match=r"^TMPDIR: Ray can't write to /proc/nowhere/ray \(.*\); set RAY_TMPDIR"
    ):
        joining.find_temporary_folder()
    assert doctor.check_ray_folder().remedy.startswith("set RAY_TMPDIR")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("l" * 100)))
    assert f"Ray's sockets go to /tmp/frpo-ray-{os.getuid()}" in doctor.check_ray_folder().found


class SlowRay:
    """ray.init on a busy machine: it raises what node.py raises."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, list[dict[str, Any]]()

    def init(self, **options: Any) -> None:
        self.asked.append(options)
        if len(self.asked) <= self.failures:
            raise Exception("The current node timed out during startup. This could happen because ...\nmore")


@pytest.mark.parametrize("failures", [2, 3])
def test_a_slow_start_is_tried_again(
    failures: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray._private import ray_constants

    slow = SlowRay(failures)
    monkeypatch.setattr(ray, "init", slow.init)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setenv(joining.ALONE, "1")
    if failures < joining.STARTS:
        joining.join(None, 2**28)
        assert len(slow.asked) == 3
    else:
        with pytest.raises(
            WorkerFailed,
            match=r"Ray did not start on this machine in 3 tries; "
            r"its logs are in .*gcs_server and raylet: The current",
        ):
            joining.join(None, 2**28)
    assert (
        capsys.readouterr().out.count("Ray is slow to start (The current node timed out during startup.") == 2
    )
    assert (os.environ[joining.ALONE], ray_constants.ENABLE_RAY_CLUSTER) == ("0", False)
