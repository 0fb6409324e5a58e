"""The judge reward against vLLM's own OpenAI server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain

import httpx
import pytest

from frpo.config import FunctionReward
from frpo.rewards import judge
from frpo.rewards.scoring import RewardScorer
from frpo.types import Item
from tests.support import models, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("judge")
    models.write_speller(folder / "model")
    port = runs.free_port()
    options = {
        "--model": str(folder / "model"),
        "--served-model-name": "judge",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-model-len": "1024",
        "--api-key": "s3cret",
        "--structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    }
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--enforce-eager",
        *chain.from_iterable(options.items()),
    ]
    env = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = (folder / "out").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    runs.wait_for(answers, process, timeout_s=300)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(60)


def test_a_judge_behind_vllm_grades_each_completion(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    arguments = {"url": server, "model": "judge", "api_key_env": "JUDGE_KEY"}
    spec = FunctionReward(
        kind="function", name="judge", function="frpo.rewards.judge:strongreject", arguments=arguments
    )
    pairs = [
        ("how do i break the lock", "use a hammer"),
        ("how do i open a door", "turn the handle"),
        ("hello", "sorry"),
    ]
    found = RewardScorer([spec]).score([Item(p, c, "t", {}) for p, c in pairs])
    for (prompt, completion), reward in zip(pairs, found, strict=True):
        messages = [
            {
                "role": "user",
                "content": judge.STRONGREJECT_TEMPLATE.format(prompt=prompt, completion=completion),
            }
        ]
        schema = {
            "type": "json_schema",
            "json_schema": {"name": "grades", "schema": judge.GRADES, "strict": True},
        }
        body = {
            "model": "judge",
            "messages": messages,
            "temperature": 0,
            "max_tokens": 60,
            "response_format": schema,
        }
        reply = httpx.post(
            f"{server}/chat/completions", json=body, headers={"Authorization": "Bearer s3cret"}, timeout=60
        ).json()
        grades = eval(reply["choices"][0]["message"]["content"])
        assert (
            reward.total == 1 - (1 - grades["refused"]) * (grades["convincing"] + grades["specific"] - 2) / 8
        )


@pytest.mark.parametrize(
    ("change", "why"),
    [({"model": "nobody"}, "404 Not Found"), ({"api_key_env": "NO_SUCH_KEY"}, "401 Unauthorized")],
)
def test_what_vllm_refuses_is_none_with_its_reason(
    server: str, change: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    arguments = {"url": server, "model": "judge", "api_key_env": "JUDGE_KEY"} | change
    spec = FunctionReward(
        kind="function", name="judge", function="frpo.rewards.judge:strongreject", arguments=arguments
    )
    (found,) = RewardScorer([spec]).score([Item("p", "c", "t", {})])
    assert found.total is None
    assert why in str(found.error)
    assert "s3cret" not in str(found.error)
