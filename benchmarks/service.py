"""The reward service under load: requests a second and latency, beside the raw model and a plain server, in
one run.

    python benchmarks/service.py runs/models/SmolLM2-135M-Instruct --seconds 20 --out docs/results

The reward model is the folder's model, its first 8 layers, with an untrained head (the cost does not depend
on it). Three ways to score the same items: `raw`, the scoring class called with large batches in a process of
its own; `frpo serve`; and `plain`, the design of OpenRLHF's serve_rm: one FastAPI process that scores each
request as it comes, without batching across requests. All of them with one thread for the model, and at most
16 requests in a batch of the service. A trivial reward shows what the service itself costs. Writes
service.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import FastAPI, Request

WORDS = [
    "the",
    "a",
    "lock",
    "door",
    "key",
    "how",
    "open",
    "what",
    "safe",
    "can",
    "not",
    "help",
    "with",
    "this",
    "answer",
    "is",
    "and",
    "then",
    "turn",
    "use",
    "tool",
    "on",
    "it",
    "careful",
    "never",
    "always",
]


LOADS = ((1, 1), (16, 1), (64, 1), (8, 16))
"""Clients, and items in each of their requests."""
LAYERS = 8
"""What `frpo reward-train` keeps."""


@dataclass(frozen=True)
class Load:
    """One closed loop: each client asks again as soon as it has its answer."""

    way: str
    reward: str
    clients: int
    items_per_request: int
    requests_per_s: float
    items_per_s: float
    p50_ms: float
    p99_ms: float
    share_of_raw: float | None


def items(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts of 8 to 24 words, completions of 16 to 96."""
    rng = random.Random(seed)

    def text(lo: int, hi: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(lo, hi)))

    return [(text(8, 24), text(16, 96)) for _ in range(count)]


def write_reward_model(base: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, num_hidden_layers=LAYERS, dtype="float32"
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def spec(folder: Path) -> dict[str, object]:
    return {"kind": "model", "name": "model", "path": str(folder)}


def raw(folder: Path, seconds: float) -> float:
    """Items a second of the scoring class with 64 items a call."""
    import torch

    from frpo.config import ModelReward
    from frpo.rewards.scoring import ModelScorer
    from frpo.types import Item

    torch.set_num_threads(1)
    scorer = ModelScorer(ModelReward.model_validate(spec(folder)))
    batch = [Item(p, c, "", {}) for p, c in items(64, 1)]
    scorer(batch)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        scorer(batch)
        count += len(batch)
    return count / (time.perf_counter() - began)


def plain(folder: Path, port: int) -> None:
    """One process, no batching across requests, the forward pass in the handler."""
    import torch
    import uvicorn

    from frpo.config import ModelReward
    from frpo.rewards.scoring import ModelScorer
    from frpo.types import Item

    torch.set_num_threads(1)
    scorer = ModelScorer(ModelReward.model_validate(spec(folder)))
    scorer.load()
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, list[float]]:
        body = await request.json()
        pairs = zip(body["prompts"], body["query"], strict=True)
        return {"rewards": scorer([Item(p, q.removeprefix(p), "", {}) for p, q in pairs])}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


async def load(url: str, clients: int, per_request: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second and their seconds, of all that end in the last three quarters of the time."""
    import aiohttp

    pool = items(1024, 2)
    times: list[float] = []
    began = time.perf_counter()
    counted = began + seconds / 4

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def client(seed: int) -> None:
            rng = random.Random(seed)
            while True:
                chosen = rng.sample(pool, per_request)
                body = {
                    "query": [p + c for p, c in chosen],
                    "prompts": [p for p, _ in chosen],
                    "labels": [""] * per_request,
                }
                asked = time.perf_counter()
                async with session.post(url, json=body) as answer:
                    answer.raise_for_status()
                    rewards = (await answer.json())["rewards"]
                assert len(rewards) == per_request
                if (now := time.perf_counter()) >= counted:
                    times.append(now - asked)

        tasks = [asyncio.create_task(client(i)) for i in range(clients)]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        ended = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # a client that failed
    return len(times) / (ended - counted), sorted(times)


def measured(
    way: str, reward: str, url: str, clients: int, per_request: int, seconds: float, raw_rate: float | None
) -> Load:
    rate, times = asyncio.run(load(url, clients, per_request, seconds))

    def at(share: float) -> float:
        return 1000 * times[min(len(times) - 1, int(share * len(times)))]

    found = Load(
        way,
        reward,
        clients,
        per_request,
        rate,
        rate * per_request,
        at(0.5),
        at(0.99),
        raw_rate and rate * per_request / raw_rate,
    )
    print(json.dumps(asdict(found)), flush=True)
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """A server in a process of its own, until it answers on its port."""
    import urllib.error
    import urllib.request

    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "FRPO_SERVICE_TOKEN")} | {
        "OMP_NUM_THREADS": "1"
    }
    process = subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)
    url, ends = f"http://127.0.0.1:{port}/get_reward", time.monotonic() + 240
    body = json.dumps({"query": ["a b"], "prompts": ["a"], "labels": [""]}).encode()
    try:
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < ends, "no answer within 240 s"
            try:
                request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                urllib.request.urlopen(request, timeout=30).close()
                break
            except urllib.error.HTTPError as error:
                if error.code in (400, 401, 422):  # 404: the proxy is up, the application not yet
                    raise
                time.sleep(0.5)
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of a causal model")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.raw:
        print(raw(given.raw, given.seconds))
        return
    if given.plain:
        plain(given.model, given.plain)
        return
    found: list[Load] = []
    this = [sys.executable, __file__]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "rm"
        write_reward_model(given.model, folder)

        def raw_now() -> float:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [*this, str(given.model), "--raw", str(folder), "--seconds", str(given.seconds)]
            return float(
                subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[
                    -1
                ]
            )

        before = raw_now()
        port = free_port()
        with running([*this, str(folder), "--plain", str(port)], port, Path(place) / "plain.log") as url:
            for clients, size in LOADS:
                found.append(measured("plain", "model", url, clients, size, given.seconds, before))
        for reward in (
            {"kind": "function", "name": "trivial", "function": "frpo.rewards:length"},
            spec(folder),
        ):
            port, service = free_port(), Path(place) / "service.yaml"
            service.write_text(
                json.dumps(
                    {
                        "rewards": [reward],
                        "port": port,
                        "replicas": {"num_cpus": 0.5, "max_batch_requests": 16},
                    }
                )
            )
            with running(
                [sys.executable, "-m", "frpo", "serve", str(service)], port, Path(place) / "serve.log"
            ) as url:
                for clients, size in LOADS:
                    name = str(reward["name"])
                    found.append(
                        measured(
                            "frpo serve",
                            name,
                            url,
                            clients,
                            size,
                            given.seconds,
                            before if name == "model" else None,
                        )
                    )
        after = raw_now()
    result = {
        "raw_items_per_s": [before, after],
        "cpus": os.cpu_count(),
        "model": given.model.name,
        "loads": [asdict(f) for f in found],
    }
    (given.out / "service.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["raw_items_per_s"]))


if __name__ == "__main__":
    main()
