"""Ray as frpo starts it on this machine: nobody else reaches it, however long the temporary folder's name and
whatever proxy is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ALONE = """
import json, os, subprocess, sys
import psutil
from frpo.joining import join

join(None, 2**28)
import ray

@ray.remote(num_cpus=0)
class Actor:
    def place(self):
        return ray.util.get_node_ip_address()

print("PLACE", ray.get(Actor.remote().place.remote()))
joiner = (
    "from frpo.joining import join; join(None, 2**28); "
    "import ray; print(ray.get(ray.remote(lambda: 7).remote()))"
)
env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
joined = subprocess.run([sys.executable, "-c", joiner], env=env, capture_output=True, text=True, timeout=120)
print("JOINED", joined.stdout.strip())
me = psutil.Process()
sockets = []
for process in (me, *me.children(recursive=True)):
    listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
    sockets += [(process.name(), *connection.laddr) for connection in listening]
print("SOCKETS", json.dumps(sockets))
print("SESSION", ray._private.worker._global_node.get_session_dir_path())
ray.shutdown()
"""
LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_ray_of_one_machine_listens_on_loopback_alone(tmp_path: Path) -> None:
    folder = tmp_path / ("a-very-long-name-" * 5)
    folder.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {
        "TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "http_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=390
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0].isupper())
    sockets = json.loads(found["SOCKETS"])
    assert {name.partition(" ")[0] for name, *_ in sockets} >= {"gcs_server", "raylet"}
    assert [s for s in sockets if s[1] not in LOOPBACK] == []
    assert (found["PLACE"], found["JOINED"]) == ("127.0.0.1", "7")
    assert found["SESSION"].startswith(f"/tmp/frpo-ray-{os.getuid()}/session_")
