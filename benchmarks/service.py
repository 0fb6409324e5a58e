"""The reward service under load: requests a second and latency, beside the raw model and a plain server, in
one run.

    python benchmarks/service.py runs/models/SmolLM2-135M-Instruct --seconds 20 --out docs/results

The reward model is the folder's model, its first 8 layers, with an untrained head (the cost does not depend
on it). Three ways to score the same items: `raw`, the scoring class called with large batches in a process of
its own, with the other cores idle and with one of them busy; `frpo serve`; and `plain`, the design of
OpenRLHF's serve_rm: one FastAPI process that scores each request as it comes, without batching across
requests. All of them with one thread for the model, and at most 16 requests in a batch of the service. A
trivial reward shows what the service itself costs. Writes service.json.
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
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import FastAPI, Request

WORDS = (
    "the", "a", "lock", "door", "key", "how", "open", "what", "safe", "can", "not", "help", "with",
    "this", "answer", "is", "and", "then", "turn", "use", "tool", "on", "it", "careful", "never", "always",
)  # fmt: skip
SERVE_LIMIT_S = 240
"""For a server to answer for the first time."""
LAYERS = 8
"""What `frpo reward-train` keeps."""
BURST_S = 0.05
"""Answers that are nearer come from one batch."""
BUSY = "while True: hash('as busy as a proxy')"


@dataclass(frozen=True)
class Load:
    """One closed loop: each client asks again as soon as it has its answer."""

    clients: int
    items_per_request: int


LOADS = (Load(1, 1), Load(16, 1), Load(64, 1), Load(8, 16))


@dataclass(frozen=True)
class Measured:
    """A way to score under one load."""

    way: str
    reward: str
    clients: int
    items_per_request: int
    requests_per_s: float
    items_per_s: float
    p50_ms: float
    p99_ms: float
    share_of_raw: float | None


def random_items(count: int, seed: int) -> list[tuple[str, str]]:
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


def model_reward(folder: Path) -> dict[str, object]:
    return {"kind": "model", "name": "model", "path": str(folder)}


def measure_raw(folder: Path, seconds: float) -> float:
    """Items a second of the scoring class with 64 items a call."""
    import torch

    from frpo.config import ModelReward
    from frpo.rewards.scoring import ModelScorer
    from frpo.types import Item

    torch.set_num_threads(1)
    scorer = ModelScorer(ModelReward.model_validate(model_reward(folder)))
    batch = [Item(prompt, completion, "", {}) for prompt, completion in random_items(64, 1)]
    scorer(batch)
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        scorer(batch)
        count += len(batch)
    return count / (time.perf_counter() - began)


def serve_plainly(folder: Path, port: int) -> None:
    """One process, no batching across requests, the forward pass in the handler."""
    import torch
    import uvicorn

    from frpo.config import ModelReward
    from frpo.rewards.scoring import ModelScorer
    from frpo.types import Item

    torch.set_num_threads(1)
    scorer = ModelScorer(ModelReward.model_validate(model_reward(folder)))
    scorer.load()
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, list[float]]:
        body = await request.json()
        pairs = zip(body["prompts"], body["query"], strict=True)
        batch = [Item(prompt, query.removeprefix(prompt), "", {}) for prompt, query in pairs]
        return {"rewards": scorer(batch)}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


async def run_load(url: str, load: Load, seconds: float) -> tuple[float, list[float]]:
    """Requests a second and their seconds, sorted, of all that end in the last three quarters of the time."""
    import aiohttp

    pool = random_items(1024, 2)
    times: list[float] = []
    ends: list[float] = []
    began = time.perf_counter()
    counted = began + seconds / 4

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def ask_on(seed: int) -> None:
            rng = random.Random(seed)
            while True:
                chosen = rng.sample(pool, load.items_per_request)
                body = {
                    "query": [prompt + completion for prompt, completion in chosen],
                    "prompts": [prompt for prompt, _ in chosen],
                    "labels": [""] * len(chosen),
                }
                asked = time.perf_counter()
                async with session.post(url, json=body) as answer:
                    answer.raise_for_status()
                    rewards = (await answer.json())["rewards"]
                assert len(rewards) == len(chosen)
                now = time.perf_counter()
                if now >= counted:
                    times.append(now - asked)
                    ends.append(now)

        tasks = [asyncio.create_task(ask_on(i)) for i in range(load.clients)]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # a client that failed
    return rate_of(ends), sorted(times)


def rate_of(ends: Sequence[float]) -> float:
    """Answers a second. They come in bursts, a batch at a time: from the end of one burst to the last answer.
    (By the clock, of nine bursts one more or less is counted by chance.)"""
    first = [end for end in ends if end - ends[0] < BURST_S]
    return (len(ends) - len(first)) / (ends[-1] - first[-1])


def measure_loads(way: str, reward: str, url: str, seconds: float, raw_rate: float | None) -> list[Measured]:
    """Under every load in turn; `raw_rate` in items a second."""
    rows = []
    for load in LOADS:
        rate, times = asyncio.run(run_load(url, load, seconds))
        items_per_s = rate * load.items_per_request
        row = Measured(
            way=way,
            reward=reward,
            clients=load.clients,
            items_per_request=load.items_per_request,
            requests_per_s=rate,
            items_per_s=items_per_s,
            p50_ms=1000 * quantile_of(times, 0.5),
            p99_ms=1000 * quantile_of(times, 0.99),
            share_of_raw=raw_rate and items_per_s / raw_rate,
        )
        print(json.dumps(asdict(row)), flush=True)
        rows.append(row)
    return rows


def quantile_of(times: Sequence[float], share: float) -> float:
    """Of sorted times."""
    return times[min(len(times) - 1, int(share * len(times)))]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def subprocess_ended_after(command: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def run_server(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """A server in a process of its own, until it answers on its port."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "FRPO_SERVICE_TOKEN")
    }
    env["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/get_reward"
    ends = time.monotonic() + SERVE_LIMIT_S
    try:
        while not is_answering(url):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < ends, f"no answer within {SERVE_LIMIT_S} s"
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def is_answering(url: str) -> bool:
    """Raises HTTPError where the service is up and refuses the request."""
    body = json.dumps({"query": ["a b"], "prompts": ["a"], "labels": [""]}).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        if error.code in (400, 401, 422):  # 404: the proxy is up, the application not yet
            raise
        return False
    except OSError:
        return False
    return True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of a causal model")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    if given.raw:
        print(measure_raw(given.raw, given.seconds))
        return
    if given.plain:
        serve_plainly(given.model, given.plain)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "rm"
        write_reward_model(given.model, folder)
        before = measure_raw_apart(given.model, folder, given.seconds)
        with subprocess_ended_after([sys.executable, "-c", BUSY]):
            beside = measure_raw_apart(given.model, folder, given.seconds)
        rows = measure_plain(folder, Path(place), given.seconds, before)
        trivial = {"kind": "function", "name": "trivial", "function": "frpo.rewards:length"}
        rows += measure_service(trivial, Path(place), given.seconds, None)
        rows += measure_service(model_reward(folder), Path(place), given.seconds, before)
        after = measure_raw_apart(given.model, folder, given.seconds)
    result = {
        "raw_items_per_s": [before, after],
        "raw_items_per_s_beside_a_busy_core": beside,
        "cpus": os.cpu_count(),
        "model": given.model.name,
        "loads": [asdict(row) for row in rows],
    }
    (given.out / "service.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "loads": len(rows)}))


def measure_raw_apart(model: Path, folder: Path, seconds: float) -> float:
    """In a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(model), "--raw", str(folder), "--seconds", str(seconds)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure_plain(folder: Path, place: Path, seconds: float, raw_rate: float) -> list[Measured]:
    port = free_port()
    command = [sys.executable, __file__, str(folder), "--plain", str(port)]
    with run_server(command, port, place / "plain.log") as url:
        return measure_loads("plain", "model", url, seconds, raw_rate)


def measure_service(
    reward: dict[str, object], place: Path, seconds: float, raw_rate: float | None
) -> list[Measured]:
    port = free_port()
    service = place / "service.yaml"
    replicas = {"num_cpus": 0.5, "max_batch_requests": 16}
    service.write_text(json.dumps({"rewards": [reward], "port": port, "replicas": replicas}))
    command = [sys.executable, "-m", "frpo", "serve", str(service)]
    with run_server(command, port, place / "serve.log") as url:
        return measure_loads("frpo serve", str(reward["name"]), url, seconds, raw_rate)


if __name__ == "__main__":
    main()
