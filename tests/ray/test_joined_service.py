"""`frpo serve` on a cluster that was started without the token's variable, as an operator's is: who is let
in, what others of the cluster can read, and several services side by side."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import runs
from tests.support.heads import RAY, Head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TOKEN, KEY = "t0ken-of-the-service-e41c", "k3y-of-the-judge-77ab"
KEYED = """
import os

def keyed(prompts, completions, *, api_key_env="FRPO_TEST_JUDGE_KEY", **_):
    return [float(len(os.environ[api_key_env])) for _ in completions]
"""
SERVICE = """
rewards:
  - {{kind: function, name: keyed, function: "{file}:keyed"}}
port: {port}
replicas: {{num_cpus: 0.1}}
"""


class Serving:
    """`frpo serve` processes on a head."""

    def __init__(self, head: Head, folder: Path) -> None:
        self.head, self.folder, self.port = head, folder, runs.free_port()
        (folder / "keyed.py").write_text(KEYED)
        (folder / "service.yaml").write_text(SERVICE.format(file=folder / "keyed.py", port=self.port))
        self.env = head.env | {"FRPO_SERVICE_TOKEN": TOKEN, "FRPO_TEST_JUDGE_KEY": KEY}

    def command(self, *sets: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "frpo",
            "serve",
            str(self.folder / "service.yaml"),
            "--address",
            self.head.address,
            *runs.options_of(sets),
        ]

    def refused(self, *sets: str, env: dict[str, str] | None = None) -> str:
        """What it says on its way out with exit code 2."""
        done = subprocess.run(
            self.command(*sets),
            env=env or self.env,
            cwd=runs.ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stdout + done.stderr
        return done.stderr

    @contextmanager
    def up(self, name: str, *sets: str) -> Iterator[subprocess.Popen[str]]:
        out = self.folder / f"{name}.out"
        with out.open("w") as log:
            process = subprocess.Popen(
                self.command(*sets),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=runs.ROOT,
                env=self.env,
            )
        try:
            runs.wait_for(lambda: "Serving at" in out.read_text(), process, timeout_s=240)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=30)

    def curl(self, *args: str, path: str = "/v1/rewards") -> tuple[str, str]:
        """Status and body."""
        command = ["curl", "-s", "-w", "\n%{http_code}", *args, f"http://127.0.0.1:{self.port}{path}"]
        body, _, status = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout.rpartition("\n")
        print("$", " ".join(command).replace(TOKEN, "$FRPO_SERVICE_TOKEN"), f"\n{body} [{status}]")
        return status, body


@pytest.fixture(scope="module")
def serving(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    assert "FRPO_SERVICE_TOKEN" not in head.env
    return Serving(head, tmp_path_factory.mktemp("joined"))


@pytest.fixture(scope="module")
def service(serving: Serving) -> Iterator[Serving]:
    with serving.up("first"):
        yield serving


def test_without_its_token_it_does_not_start(serving: Serving) -> None:
    said = serving.refused(env=serving.head.env | {"FRPO_TEST_JUDGE_KEY": KEY})
    assert said.startswith(
        "token_env: FRPO_SERVICE_TOKEN is not set, and the service on a cluster that others reach must know "
        "its token"
    )
    said = serving.refused("rewards.0.arguments={api_key_env: FRPO_TEST_NOWHERE}")
    assert said.startswith(
        "rewards.0.arguments.api_key_env: the environment variable FRPO_TEST_NOWHERE is not set"
    )


def test_who_is_let_in(service: Serving) -> None:
    assert service.curl()[0] == "401"
    assert service.curl("-H", "Authorization: Bearer wrong")[0] == "401"
    assert service.curl("-u", f"anybody:{TOKEN}")[0] == "200"
    assert service.curl("-H", f"Authorization: Bearer {TOKEN}")[0] == "200"
    ask = ["--json", '{"items": [{"prompt": "p", "completion": "c"}]}']
    assert service.curl(*ask, path="/v1/score")[0] == "401"
    status, body = service.curl(*ask, "-H", f"Authorization: Bearer {TOKEN}", path="/v1/score")
    assert (status, body) == (
        "200",
        f'{{"scores":[{{"score":{len(KEY)}.0,"parts":{{"keyed":{len(KEY)}.0}},"error":null}}]}}',
    )
    assert service.curl("-I", path="/healthz")[0] == "200"
    chunked = [
        "-H",
        "Transfer-Encoding: chunked",
        "-H",
        "Expect: 100-continue",
        "-H",
        f"Authorization: Bearer {TOKEN}",
    ]
    assert service.curl(*ask, *chunked, path="/v1/score")[0] == "200"
    assert service.curl("-d", "x", "-H", f"Authorization: Bearer {TOKEN}", path="/v1/score")[0] == "415"


def test_nobody_else_reads_its_secrets(service: Serving) -> None:
    """Neither the token nor its digest, which a guess could be compared with, nor the judge's key."""
    head = service.head
    dashboard = head.env["RAY_API_SERVER_ADDRESS"]
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    shown: dict[str, str] = {}
    for path in (
        "/api/serve/applications/",
        "/logical/actors",
        "/api/v0/actors?detail=1",
        "/api/v0/tasks?detail=1",
        "/api/v0/workers?detail=1",
        "/api/v0/runtime_envs?detail=1",
        "/nodes?view=summary",
        "/api/v0/nodes?detail=1",
        "/api/jobs/",
    ):
        answer = httpx.get(dashboard + path, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        assert answer.status_code == 200, f"{path}: {answer.text}"
        shown[path] = answer.text
    bin_ = Path(RAY).parent
    for command in (
        ["ray", "list", "actors", "--detail"],
        ["ray", "list", "workers", "--detail"],
        ["serve", "status"],
        ["serve", "config"],
    ):
        asked = [str(bin_ / command[0]), *command[1:]] + (
            ["--address", dashboard] if command[0] == "serve" else []
        )
        done = subprocess.run(asked, env=head.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        shown[" ".join(command)] = done.stdout
    assert "frpo-rewards" in shown["/api/serve/applications/"]
    assert "ServeReplica:frpo-rewards" in shown["ray list actors --detail"]
    files = [f for f in head.folder.rglob("*") if f.is_file() and not f.is_symlink()]
    assert any("replica_frpo-rewards" in f.name for f in files)
    shown |= {
        str(f): f.read_bytes().decode(errors="replace") for f in [*files, *service.folder.glob("*.out")]
    }
    digest = hashlib.sha256(TOKEN.encode())
    for where, text in shown.items():
        found = [s for s in (TOKEN, KEY, digest.hexdigest(), repr(digest.digest())[2:-1]) if s in text]
        assert not found, where


def test_another_service_never_takes_the_place_of_the_first(service: Serving) -> None:
    assert service.refused().startswith("name: frpo-rewards is served on this cluster already")
    assert service.refused("name=second").startswith(
        "route_prefix: / is that of frpo-rewards on this cluster; choose another, such as /second"
    )
    said = service.refused("name=second", "route_prefix=/second", f"port={runs.free_port()}")
    assert said.startswith(f"port: this cluster serves at 127.0.0.1:{service.port} already")
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    with service.up("second", "name=second", "route_prefix=/second", "rewards.0.name=other"):
        assert service.get("/second/healthz").status_code == 200
        assert service.get("/second/v1/rewards").status_code == 401
        assert service.get("/second/v1/rewards", **bearer).json()["rewards"][0]["name"] == "other"
        assert service.get("/v1/rewards", **bearer).json()["rewards"][0]["name"] == "keyed"
        assert service.get("/second/readyz").status_code == 200
    assert service.get("/v1/rewards", **bearer).json()["rewards"][0]["name"] == "keyed"
    assert service.get("/second/v1/rewards", **bearer).status_code == 404


def test_one_whose_process_was_killed_is_started_again(service: Serving) -> None:
    third: Any = ["name=third", "route_prefix=/third"]
    with service.up("third", *third) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        time.sleep(10)  # until the cluster has missed it
        with service.up("again", *third):
            assert service.get("/third/healthz").status_code == 200
    assert service.get("/healthz").status_code == 200
