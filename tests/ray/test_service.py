"""`frpo serve` on real Ray Serve: every format, a replica killed under load, overload, and the way down."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SLOW = """
import time

def slow(prompts, completions, **columns):
    time.sleep(0.2)
    return [float(len(c)) for c in completions]
"""
SERVICE = """
rewards:
  - {{kind: function, name: words, function: "frpo.rewards:length", arguments: {{max_words: 2}}, tasks: [""]}}
  - {{kind: function, name: slow, function: "{file}:slow", tasks: [slow]}}
port: {port}
replicas: {{num_cpus: 0.1, max_batch_requests: 4, max_queued_requests: 8, max_replicas: 2}}
limits: {{timeout_s: 60}}
"""
TOKEN = "s3cret-of-the-test"


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[httpx.Client, subprocess.Popen[str], Path]]:
    folder = tmp_path_factory.mktemp("service")
    port = runs.free_port()
    (folder / "slow.py").write_text(SLOW)
    (folder / "service.yaml").write_text(SERVICE.format(file=folder / "slow.py", port=port))
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "FRPO_SERVICE_TOKEN": TOKEN,
        "RAY_AUTH_MODE": "disabled",
    }
    log = (folder / "out").open("w")
    command = [sys.executable, "-m", "frpo", "serve", str(folder / "service.yaml")]
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=runs.ROOT, env=env
    )
    runs.wait_for(lambda: "Serving at" in (folder / "out").read_text(), process, timeout_s=180)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=90
    ) as client:
        yield client, process, folder / "out"
    if process.poll() is None:
        process.kill()


def slow(client: httpx.Client, text: str) -> httpx.Response:
    return client.post("/slime?task=slow", json={"prompt": "p", "response": text})


def test_every_format_answers(service: tuple[httpx.Client, subprocess.Popen[str], Path]) -> None:
    client, *_ = service
    assert client.get("/readyz").json() == {"status": "ready"}
    assert httpx.get(f"{client.base_url}/v1/rewards").status_code == 401
    assert client.post(
        "/get_reward", json={"query": ["q: a b", "q: a b c"], "prompts": ["q: ", "q: "]}
    ).json()["rewards"] == [1.0, 0.5]
    assert client.post("/classify", json={"input": ["a b c d"]}).json()["data"][0]["probs"] == [0.0]
    assert slow(client, "abc").json() == 3.0
    items = [
        {"prompt": "p", "completion": "abcd", "task": "slow"},
        {"prompt": "p", "completion": "a"},
        {"prompt": "p", "completion": "a", "task": "x"},
    ]
    found = client.post("/v1/score", json={"items": items}).json()["scores"]
    assert [s["score"] for s in found] == [4.0, 1.0, None]


async def fetched_as_openrlhf_does(
    url: str, data: dict[str, list[str]], try_max_times: int = 5
) -> dict[str, Any]:
    """The calls that OpenRLHF's executor makes for each completion: a session a request, retries a second
    apart, no header."""
    for _ in range(try_max_times):
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session,
                session.post(url, json=data) as response,
            ):
                response.raise_for_status()
                return dict(await response.json())
        except aiohttp.ClientError:
            await asyncio.sleep(1)
    raise RuntimeError("no answer")


def test_openrlhf_trains_against_it(service: tuple[httpx.Client, subprocess.Popen[str], Path]) -> None:
    """40 completions at once against a queue of 8: those refused come again, and each gets its own score. The
    token is in the URL."""
    client, *_ = service
    url = f"{client.base_url}/get_reward?task=slow".replace("://", f"://frpo:{TOKEN}@")
    bodies = [
        {"query": ["p: " + "x" * n + "<|im_end|>"], "prompts": ["p: "], "labels": [""]} for n in range(1, 41)
    ]

    async def all_of_them() -> list[dict[str, Any]]:
        return await asyncio.gather(*(fetched_as_openrlhf_does(url, body, 30) for body in bodies))

    answers = asyncio.run(all_of_them())
    assert [a["rewards"] for a in answers] == [[float(n)] for n in range(1, 41)]
    assert answers[4] == {"rewards": [5.0], "scores": [5.0], "extra_logs": {"slow": [5.0]}}


def test_no_request_is_lost_when_a_replica_is_killed(
    service: tuple[httpx.Client, subprocess.Popen[str], Path],
) -> None:
    """Every request is answered by its own right score."""
    client, *_ = service
    (replica,) = runs.replicas("reward-slow")
    texts = ["x" * n for n in range(1, 25)]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(slow, client, text) for text in texts]
        time.sleep(0.3)
        replica.send_signal(signal.SIGKILL)
        answers = [a.result() for a in asked]
    assert [(a.status_code, a.json()) for a in answers] == [(200, float(len(t))) for t in texts]
    assert not replica.is_running()


def test_overload_is_answered_at_once(service: tuple[httpx.Client, subprocess.Popen[str], Path]) -> None:
    client, *_ = service
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda _: slow(client, "abc"), range(80)))
    codes = [a.status_code for a in answers]
    refused = [a for a in answers if a.status_code == 503]
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 8
    assert (
        refused[0].json()["error"]["message"]
        == "overloaded: 8 requests wait for the reward 'slow' (replicas.max_queued_requests)"
    )
    assert refused[0].headers["retry-after"] == "1"
    assert max(a.elapsed.total_seconds() for a in refused) < 5
    assert all(a.json() == 3.0 for a in answers if a.status_code == 200)
    assert slow(client, "abc").json() == 3.0


def test_a_second_replica_comes_when_requests_wait(
    service: tuple[httpx.Client, subprocess.Popen[str], Path],
) -> None:
    """Serve waits for 30 s of load before it adds one."""
    client, *_ = service
    assert len(runs.replicas("reward-slow")) == 1
    until = time.monotonic() + 150
    with ThreadPoolExecutor(12) as pool:

        def ask(_: int) -> int:
            count = 0
            while time.monotonic() < until and len(runs.replicas("reward-slow")) < 2:
                count += slow(client, "abc").status_code == 200
            return count

        assert min(pool.map(ask, range(12))) > 3
    assert len(runs.replicas("reward-slow")) == 2
    assert slow(client, "abc").json() == 3.0


def test_sigterm_takes_it_down_and_no_log_holds_the_token(
    service: tuple[httpx.Client, subprocess.Popen[str], Path],
) -> None:
    client, process, out = service
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    text = out.read_text()
    assert text.rstrip().endswith("Stopped.")
    assert TOKEN not in text
    with pytest.raises(httpx.ConnectError):
        client.get("/healthz")
