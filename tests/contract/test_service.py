"""The reward service's HTTP side over a backend of plain functions: formats, limits, errors, the token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.testclient import TestClient

from frpo.config.service import ServiceConfig
from frpo.scoring import Item, Scorer
from frpo.service.app import Overloaded, Unavailable, make_app
from frpo.service.wire import GetRewardRequest, items_of_get_reward
from frpo.types import Reward

REWARDS: list[dict[str, Any]] = [
    {"kind": "function", "name": "right", "function": "frpo.rewards:exact_answer", "weight": 2.0, "tasks": ["", "sum"]},
    {"kind": "function", "name": "short", "function": "frpo.rewards:length", "arguments": {"max_words": 2}},
]


class Here:
    """The scoring classes in this process."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config

    async def score(self, items: Sequence[Item], names: Sequence[str]) -> list[Reward]:
        return Scorer([r for r in self.config.rewards if r.name in names]).score(items)

    async def ready(self) -> bool:
        return True


class Raising(Here):
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def score(self, items: Sequence[Item], names: Sequence[str]) -> list[Reward]:
        if self.error:
            raise self.error
        await asyncio.sleep(5)
        return []

    async def ready(self) -> bool:
        return False


def config(**fields: Any) -> ServiceConfig:
    return ServiceConfig.model_validate({"rewards": REWARDS, **fields})


def client(cfg: ServiceConfig | None = None, backend: Any = None) -> TestClient:
    cfg = cfg or config()
    return TestClient(make_app(cfg, backend or Here(cfg)), raise_server_exceptions=False)


def test_our_own_format_gives_parts_and_null_for_what_failed() -> None:
    items = [
        {"prompt": "1 + 1?", "completion": "2", "task": "sum", "columns": {"answer": "2"}},
        {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "1 + 1?"}], "completion": "a b c", "columns": {"answer": "2"}},
        {"prompt": "1 + 1?", "completion": "2", "task": "sum", "columns": {"answer": None}},
        {"prompt": "hello", "completion": "hi", "task": "chat"},
    ]  # fmt: skip
    found = client().post("/v1/score", json={"items": items}).json()["scores"]
    assert found[0] == {"score": 3.0, "parts": {"right": 1.0, "short": 1.0}, "error": None}
    assert found[1] == {"score": 0.5, "parts": {"right": 0.0, "short": 0.5}, "error": None}
    assert found[2] == {"score": None, "parts": {"right": None, "short": 1.0}, "error": "right: gave None"}
    assert found[3] == {"score": 1.0, "parts": {"short": 1.0}, "error": None}
    one = client().post("/v1/score", json={"items": items[3:], "rewards": ["right"]}).json()["scores"]
    assert one == [{"score": None, "parts": {}, "error": "no reward applies to task 'chat'; name it in rewards.*.tasks"}]
    assert client().post("/v1/score", json={"items": []}).json() == {"scores": []}


def test_openrlhf_gets_rewards_of_any_number_of_queries() -> None:
    body = {"query": ["1 + 1?2", "1 + 1?2 3 4"], "prompts": ["1 + 1?", "1 + 1?"], "labels": ["2", "2"]}
    found = client().post("/get_reward", json=body).json()
    assert found == {"rewards": [3.0, 0.5], "scores": [3.0, 0.5], "extra_logs": {"right": [1.0, 0.0], "short": [1.0, 0.5]}}
    assert client().post("/get_reward", json={"query": [], "prompts": [], "labels": []}).json()["rewards"] == []
    assert client().post("/get_reward?reward=short", json={"query": ["a b c"]}).json()["rewards"] == [0.5]
    wrong = client().post("/get_reward", json={"query": ["a"], "labels": []})
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (422, "body: Value error, labels has 0 entries for 1 queries")


@pytest.mark.parametrize(
    "ending", ["<|im_end|>", "<|im_end|>\n", "</s>", "<|eot_id|><|end_of_text|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", ""]
)
def test_openrlhf_sends_what_it_decoded_with_special_tokens(ending: str) -> None:
    prompt = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    (item,) = items_of_get_reward(GetRewardRequest(query=[f"{prompt}2{ending}"], prompts=[prompt], labels=["2"]))
    assert (item.prompt, item.completion, item.ending) == (prompt, "2", ending)
    body = {"query": [f"{prompt}2{ending}"], "prompts": [prompt], "labels": ["2"]}
    assert client().post("/get_reward?reward=right", json=body).json()["rewards"] == [2.0]


def test_vllm_and_slime() -> None:
    found = client().post("/classify", json={"model": "short", "input": ["a", "a b c"]}).json()
    assert [d["probs"] for d in found["data"]] == [[1.0], [0.5]]
    assert (found["model"], found["data"][1]["num_classes"]) == ("short", 1)
    assert client().post("/slime", json={"prompt": "1 + 1?", "response": "2", "label": "2"}).json() == 3.0


def test_a_format_without_null_is_answered_503_where_a_score_failed() -> None:
    found = client().post("/get_reward", json={"query": ["a"]})  # exact_answer without an answer column raises
    assert found.status_code == 503
    assert found.headers["retry-after"] == "1"
    assert "item 0 has no score: right: TypeError" in found.json()["error"]["message"]


def test_what_is_served() -> None:
    found = client().get("/v1/rewards").json()["rewards"]
    assert [(r["name"], r["weight"], r["tasks"]) for r in found] == [("right", 2.0, ["", "sum"]), ("short", 1.0, [])]
    assert client().get("/healthz").json() == {"status": "ok"}
    assert client().get("/readyz").status_code == 200
    assert client(backend=Raising(None)).get("/readyz").status_code == 503


@pytest.mark.parametrize(
    ("limits", "body", "status", "said"),
    [
        ({"max_items": 1}, {"items": [{"prompt": "", "completion": ""}] * 2}, 422, "2 items in one request, at most 1"),
        ({"max_characters": 3}, {"items": [{"prompt": "ab", "completion": "cd"}]}, 422, "item 0 has 4 characters, at most 3"),
        ({"max_items_in_flight": 1}, {"items": [{"prompt": "", "completion": ""}] * 2}, 429, "at most 1; ask again"),
        ({}, {"items": [], "rewards": ["other"]}, 422, "no reward is called 'other'; GET /v1/rewards lists them"),
        ({}, {"items": [{"prompt": 5, "completion": ""}]}, 422, "body.items.0.prompt.str: Input should be a valid string"),
        ({"max_body_mib": 1e-4}, {"items": [{"prompt": "x" * 200, "completion": ""}]}, 413, "the body is larger than 104 bytes"),
    ],
)
def test_limits(limits: dict[str, Any], body: Any, status: int, said: str) -> None:
    found = client(config(limits=limits)).post("/v1/score", json=body)
    assert found.status_code == status
    assert said in found.json()["error"]["message"]
    assert ("retry-after" in found.headers) == (status in (429, 503))


def test_a_body_without_a_length_is_cut_off_too() -> None:
    pieces = (b"x" * 1000 for _ in range(1000))
    assert client(config(limits={"max_body_mib": 0.01})).post("/v1/score", content=pieces).status_code == 413


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Overloaded("256 requests wait"), 503, "overloaded: 256 requests wait"),
        (Unavailable("no process of the reward 'x' answers"), 503, "no process of the reward 'x' answers"),
        (ValueError("a secret prompt"), 500, "the service failed; its log has more"),
        (None, 504, "no scores within 0.05 s (limits.timeout_s)"),
    ],
)
def test_what_goes_wrong_behind_it(error: Exception | None, status: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    found = client(config(limits={"timeout_s": 0.05}), Raising(error)).post(
        "/v1/score", json={"items": [{"prompt": "p", "completion": "c"}]}
    )
    assert (found.status_code, found.json()["error"]["message"]) == (status, said)
    assert "a secret prompt" not in caplog.text


def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRPO_SERVICE_TOKEN", "s3cret")
    asked = client()
    assert asked.get("/healthz").status_code == 200
    for path in ("/v1/rewards", "/openapi.json"):
        found = asked.get(path)
        assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        assert asked.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert asked.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert asked.get(path, auth=("anybody", "s3cret")).status_code == 200  # http://anybody:s3cret@host/...
        assert asked.get(path, auth=("s3cret", "wrong")).status_code == 401
        assert asked.get(path, headers={"Authorization": "Basic no-base64!"}).status_code == 401
    assert "s3cret" not in json.dumps(config().model_dump(mode="json"))


def test_nothing_but_loopback_is_bound_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FRPO_SERVICE_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"host: 0\.0\.0\.0 can be reached from outside; set a token"):
        config(host="0.0.0.0")
    monkeypatch.setenv("FRPO_SERVICE_TOKEN", "s3cret")
    assert config(host="0.0.0.0").token == "s3cret"


def test_the_in_flight_count_comes_back_down() -> None:
    asked = client(config(limits={"max_items_in_flight": 2, "timeout_s": 0.05}), Raising(None))
    for _ in range(3):
        assert asked.post("/v1/score", json={"items": [{"prompt": "p", "completion": "c"}] * 2}).status_code == 504
