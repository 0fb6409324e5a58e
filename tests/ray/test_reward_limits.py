"""One completion that hangs: in a run its group loses it alone, in the service its caller alone waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frpo.config import FunctionReward
from frpo.config.service import ServiceConfig
from frpo.types import Completion, Group, Prompt
from tests.support import runs

HANGS = """
def grade(prompts, completions, messages, completion_ids=None, **_):
    if any("bad" in c for c in completions):
        9 ** (9 ** 8)  # C code that holds the interpreter
    return [float(len(c)) for c in completions]

def chat(prompts, completions, completion_ids, trainer_state, **_):
    rows = zip(prompts, completions, completion_ids)
    return [len(p) + len(c[0]["content"]) + sum(i) + trainer_state.global_step for p, c, i in rows]
"""
LIMIT_S = 3.0


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hangs") / "hangs_in_c.py"
    found.write_text(HANGS)
    return found


def group(index: int, *texts: str, **fields: Any) -> Group:
    completions = tuple(
        Completion(np.array([1, 2], np.int32), np.zeros(2, np.float32), np.array([7, 8], np.int32), t, "stop")
        for t in texts
    )
    return Group(index, Prompt(str(index), "p", np.zeros(1, np.int32), "t", {}, **fields), completions)


def test_in_a_run_the_other_completions_and_groups_are_scored(ray_cluster: None, file: Path) -> None:
    import ray

    from frpo.actors.reward import RewardPool, RewardWorker

    reward = FunctionReward(kind="function", name="grade", function=f"{file}:grade", timeout_s=LIMIT_S)
    handle: Any = ray.remote(RewardWorker).options(num_cpus=0.1).remote((reward,), "weighted")
    pool = RewardPool([handle], timeout_s=120, restarts=0)
    ray.get(handle.ping.remote(), timeout=120)
    began = time.monotonic()
    stuck = pool.score(group(0, "a", "bb", "bad", "dddd"))
    others = [pool.score(group(i, "x", "yy")) for i in range(1, 9)]
    assert [[r.total for r in call.result()] for call in others] == [[1.0, 2.0]] * 8
    assert time.monotonic() - began < LIMIT_S
    assert [r.total for r in stuck.result()] == [1.0, 2.0, None, 4.0]
    assert time.monotonic() - began < 2 * LIMIT_S + 3
    ray.kill(handle)


def test_a_function_gets_the_conversation_the_tokens_and_the_step(ray_cluster: None, file: Path) -> None:
    import ray

    from frpo.actors.reward import RewardPool, RewardWorker

    reward = FunctionReward(kind="function", name="chat", function=f"{file}:chat")
    handle: Any = ray.remote(RewardWorker).options(num_cpus=0.1).remote((reward,), "weighted")
    talk = tuple({"role": "user" if i % 2 == 0 else "assistant", "content": "x"} for i in range(3))
    found = (
        RewardPool([handle], timeout_s=120, restarts=0)
        .score(group(0, "abcd", messages=talk, conversational=True))
        .result()
    )
    assert [(r.total, r.error) for r in found] == [(3 + 4 + 3 + 7, None)]
    ray.kill(handle)


@pytest.fixture
def service(ray_cluster: None, file: Path) -> Iterator[str]:
    from ray import serve

    from frpo.deploy.service import serve_on_cluster

    rewards = [{"kind": "function", "name": "grade", "function": f"{file}:grade", "timeout_s": LIMIT_S}]
    replicas = {"num_cpus": 0.1, "max_batch_requests": 64}
    config = ServiceConfig.model_validate(
        {"rewards": rewards, "port": runs.free_port(), "replicas": replicas}
    )
    with serve_on_cluster(config, None) as url:
        yield url
    serve.shutdown()


@pytest.mark.slow
def test_in_the_service_the_other_callers_are_answered(service: str) -> None:
    import httpx

    def ask(text: str) -> tuple[Any, float]:
        began = time.monotonic()
        answer = httpx.post(
            f"{service}/v1/score", json={"items": [{"prompt": "p", "completion": text}]}, timeout=60
        )
        return answer.json()["scores"][0], time.monotonic() - began

    ask("warm")
    with ThreadPoolExecutor(64) as callers:
        answers = list(callers.map(ask, ["bad", *["x" * i for i in range(1, 64)]]))
    assert [score["score"] for score, _ in answers] == [None, *map(float, range(1, 64))]
    assert "took longer than 3 s" in answers[0][0]["error"]
    assert max(seconds for _, seconds in answers[1:]) < LIMIT_S
