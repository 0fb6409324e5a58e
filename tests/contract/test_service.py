"""The reward service's HTTP side over a backend of plain functions: formats, limits, errors, the token."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import re
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import lists, sampled_from
from starlette.testclient import TestClient

from frpo.config import ConfigError
from frpo.config.service import ServiceConfig, token_digest
from frpo.service.app import Overloaded, Unavailable, make_app
from frpo.service.wire import (
    ChatRequest,
    GetRewardRequest,
    ScoreRequest,
    SlimeRequest,
    decoding_of,
    ending_at,
    item_of_slime,
    items_of_get_reward,
    items_of_score,
)
from frpo.types import Decoding, Item, Reward
from tests.support.service import REWARDS, Here, config


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


def client(cfg: ServiceConfig | None = None, backend: Any = None, digest: bytes | None = None) -> TestClient:
    cfg = cfg or config()
    return TestClient(make_app(cfg, backend or Here(cfg), digest), raise_server_exceptions=False)


def test_our_own_format_gives_parts_and_null_for_what_failed() -> None:
    items = [
        {"prompt": "1 + 1?", "completion": "2", "task": "sum", "columns": {"answer": "2"}},
        {
            "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "1 + 1?"}],
            "completion": "a b c",
            "columns": {"answer": "2"},
        },
        {"prompt": "1 + 1?", "completion": "2", "task": "sum", "columns": {"answer": None}},
        {"prompt": "hello", "completion": "hi", "task": "chat"},
    ]
    scores = client().post("/v1/score", json={"items": items}).json()["scores"]
    assert scores[0] == {"score": 3.0, "parts": {"right": 1.0, "short": 1.0}, "error": None}
    assert scores[1] == {"score": 0.5, "parts": {"right": 0.0, "short": 0.5}, "error": None}
    assert scores[2] == {
        "score": 1.0,
        "parts": {"short": 1.0},
        "error": None,
    }  # a row without an answer is not right's
    assert scores[3] == {"score": 1.0, "parts": {"short": 1.0}, "error": None}
    one = client().post("/v1/score", json={"items": items[3:], "rewards": ["right"]}).json()["scores"]
    assert one == [
        {"score": None, "parts": {}, "error": "no reward applies to task 'chat'; name it in rewards.*.tasks"}
    ]
    assert client().post("/v1/score", json={"items": []}).json() == {"scores": []}


def test_openrlhf_gets_rewards_of_any_number_of_queries() -> None:
    body = {"query": ["1 + 1?2", "1 + 1?2 3 4"], "prompts": ["1 + 1?", "1 + 1?"], "labels": ["2", "2"]}
    answer = client().post("/get_reward", json=body).json()
    assert answer == {
        "rewards": [3.0, 0.5],
        "scores": [3.0, 0.5],
        "extra_logs": {"right": [1.0, 0.0], "short": [1.0, 0.5]},
    }
    assert (
        client().post("/get_reward", json={"query": [], "prompts": [], "labels": []}).json()["rewards"] == []
    )
    assert client().post("/get_reward?reward=short", json={"query": ["a b c"]}).json()["rewards"] == [0.5]
    wrong = client().post("/get_reward", json={"query": ["a"], "labels": []})
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (
        422,
        "body: Value error, labels has 0 entries for 1 queries",
    )


@pytest.mark.parametrize(
    "ending",
    [
        "<|im_end|>",
        "<|im_end|>\n",
        "</s>",
        "<|eot_id|><|end_of_text|>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",
        "",
    ],
)
def test_openrlhf_sends_what_it_decoded_with_special_tokens(ending: str) -> None:
    prompt = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    (item,) = items_of_get_reward(
        GetRewardRequest(query=[f"{prompt}2{ending}"], prompts=[prompt], labels=["2"])
    )
    assert (item.prompt, item.completion, item.ending) == (prompt, "2", ending)
    body = {"query": [f"{prompt}2{ending}"], "prompts": [prompt], "labels": ["2"]}
    assert client().post("/get_reward?reward=right", json=body).json()["rewards"] == [2.0]


def test_vllm_and_slime() -> None:
    answer = client().post("/classify", json={"model": "short", "input": ["a", "a b c"]}).json()
    assert [d["probs"] for d in answer["data"]] == [[1.0], [0.5]]
    assert (answer["model"], answer["data"][1]["num_classes"]) == ("short", 1)
    assert client().post("/slime", json={"prompt": "1 + 1?", "response": "2", "label": "2"}).json() == 3.0


def test_a_format_without_null_is_answered_503_where_a_score_failed() -> None:
    response = client().post(
        "/get_reward", json={"query": ["a"]}
    )  # exact_answer without an answer column raises
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "item 0 has no score: right: TypeError" in response.json()["error"]["message"]


def test_what_is_served() -> None:
    served = client().get("/v1/rewards").json()["rewards"]
    assert [(r["name"], r["weight"], r["tasks"]) for r in served] == [
        ("right", 2.0, ["", "sum"]),
        ("short", 1.0, []),
    ]
    assert client().get("/healthz").json() == {"status": "ok"}
    assert client().get("/readyz").status_code == 200
    assert client(backend=Raising(None)).get("/readyz").status_code == 503


@pytest.mark.parametrize(
    ("limits", "body", "status", "said"),
    [
        (
            {"max_items": 1},
            {"items": [{"prompt": "", "completion": ""}] * 2},
            422,
            "2 items in one request, at most 1",
        ),
        (
            {"max_characters": 3},
            {"items": [{"prompt": "ab", "completion": "cd"}]},
            422,
            "item 0 has 4 characters, at most 3",
        ),
        (
            {"max_items_in_flight": 1},
            {"items": [{"prompt": "", "completion": ""}] * 2},
            429,
            "at most 1; ask again",
        ),
        (
            {},
            {"items": [], "rewards": ["other"]},
            422,
            "no reward is called 'other'; GET /v1/rewards lists them",
        ),
        (
            {},
            {"items": [{"prompt": 5, "completion": ""}]},
            422,
            "body.items.0.prompt.str: Input should be a valid string",
        ),
        (
            {"max_body_mib": 1e-4},
            {"items": [{"prompt": "x" * 200, "completion": ""}]},
            413,
            "the body is larger than 104 bytes",
        ),
    ],
)
def test_limits(limits: dict[str, Any], body: Any, status: int, said: str) -> None:
    response = client(config(limits=limits)).post("/v1/score", json=body)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))


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
def test_what_goes_wrong_behind_it(
    error: Exception | None, status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    response = client(config(limits={"timeout_s": 0.05}), Raising(error)).post(
        "/v1/score", json={"items": [{"prompt": "p", "completion": "c"}]}
    )
    assert (response.status_code, response.json()["error"]["message"]) == (status, said)
    assert "a secret prompt" not in caplog.text


def test_the_token() -> None:
    asked = client(digest=hashlib.sha256(b"s3cret").digest())
    assert asked.get("/healthz").status_code == 200
    for path in ("/v1/rewards", "/openapi.json", "/nowhere"):
        response = asked.get(path)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        known = 404 if path == "/nowhere" else 200
        assert asked.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert asked.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == known
        assert (
            asked.get(path, auth=("anybody", "s3cret")).status_code == known
        )  # http://anybody:s3cret@host/...
        assert asked.get(path, auth=("s3cret", "wrong")).status_code == 401
        assert asked.get(path, headers={"Authorization": "Basic no-base64!"}).status_code == 401
    big = asked.post("/v1/score", content=b"x" * (9 << 20))  # nothing of it is read
    assert big.status_code == 401


@pytest.mark.parametrize("path", ["/a/healthz", "/a/v1/rewards", "/healthz/../v1/rewards", "//healthz"])
def test_under_a_route_prefix_the_same_paths_are_open(path: str) -> None:
    cfg = config()
    asked = TestClient(
        make_app(cfg, Here(cfg), hashlib.sha256(b"s3cret").digest()),
        root_path="/a",
        raise_server_exceptions=False,
    )
    assert asked.get(path).status_code == (200 if path == "/a/healthz" else 401)


SET, OPEN = {"FRPO_SERVICE_TOKEN": "s3cret\n"}, {"host": "0.0.0.0"}
MISSING = "token_env: FRPO_SERVICE_TOKEN is not set, and the service on "


@pytest.mark.parametrize(
    ("env", "fields", "joined", "found"),
    [
        (SET, {}, False, "s3cret"),
        (SET, OPEN, True, "s3cret"),
        ({"MINE": "other"} | SET, {"token_env": "MINE"}, True, "other"),
        (SET, {"token_env": ""}, True, None),
        ({}, {}, False, None),
        ({"FRPO_SERVICE_TOKEN": " "}, {}, True,
         f"{MISSING}a cluster that others reach must know its token; "
         "export it where you start the service, or"),
        ({}, OPEN, False, f"{MISSING}0.0.0.0 must know its token; export it where you start the service"),
        ({}, {"token_env": "FRPO_SERVICE_TOKEN"}, False, f"{MISSING}127.0.0.1 must know"),
        ({"FRPO_SERVICE_TOKEN": "pass word"}, {}, True, "holds characters that no bearer token has"),
        ({"FRPO_SERVICE_TOKEN": "pässword"}, {}, True, "holds characters that no bearer token has"),
    ],
)  # fmt: skip
def test_a_service_that_cannot_know_its_token_does_not_start(
    env: dict[str, str],
    fields: dict[str, Any],
    joined: bool,
    found: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FRPO_SERVICE_TOKEN", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if found and found not in ("s3cret", "other"):
        with pytest.raises(ConfigError) as said:
            token_digest(config(**fields), joined=joined)
        assert found in str(said.value)
    else:
        assert token_digest(config(**fields), joined=joined) == (
            hashlib.sha256(found.encode()).digest() if found else None
        )
    assert "s3cret" not in json.dumps(config(**fields).model_dump(mode="json"))


def test_where_it_answers() -> None:
    assert config().url == "http://127.0.0.1:8000"
    assert config(host="::1", port=81, route_prefix="/a").url == "http://[::1]:81/a"


def test_no_token_on_every_interface_is_refused() -> None:
    with pytest.raises(ValueError, match=r"token_env: '' serves everybody who reaches 0\.0\.0\.0"):
        config(host="0.0.0.0", token_env="")
    for wrong in ("safety", "/safety/", "/a b", "/../x", "/{x}", "//"):
        with pytest.raises(ValueError, match="route_prefix"):
            config(route_prefix=wrong)


JSON = {"Content-Type": "application/json"}
ITEM = '{"prompt": "p", "completion": "c"}'
DEEP = "[" * 100 + "]" * 100


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (gzip.compress(b"{}", mtime=0), JSON | {"Content-Encoding": "gzip"}, 415,
         "Content-Encoding: gzip is not read here; send the body as it is"),
        (b"{}", {}, 415, "send the header Content-Type: application/json"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "send the header Content-Type"),
        (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "send the header Content-Type"),
        (b"{}", {"Content-Type": "application/json; charset=utf-16"}, 415, "must be JSON in UTF-8"),
        (b"{}", {"Content-Type": "application/json; charset=UTF-8", "Content-Encoding": "identity"}, 422,
         "body.items: Field required"),
        (b"{}", {"Content-Type": "application/vnd.api+json"}, 422, "body.items: Field required"),
        (b"", JSON, 422, "body: Field required"),
        (b"{", JSON, 422, "body: no JSON: Expecting property name"),
        (b"[" * 60_000, JSON, 422, "body: nested deeper than 64 levels"),
        (b'{"items": [' + b"[]," * 2_000_000 + b"[]]}", JSON, 422,
         "body: more than 187500 lists and objects"),
        (f'{{"items": [{{"prompt": "p", "completion": "c", "columns": {{"a": {DEEP}}}}}]}}', JSON, 422,
         "body: nested deeper than 64 levels"),
        ('{"items": [], "items": []}', JSON, 422, "body: a name stands twice in one object"),
        (f'{{"items": [{ITEM[:-1]}, "columns": {{"a": NaN}}}}]}}', JSON, 422,
         "body: NaN and infinities are not JSON"),
        (f'{{"items": [{ITEM[:-1]}, "columns": {{"a": -Infinity}}}}]}}', JSON, 422,
         "body: NaN and infinities are not JSON"),
        (f'{{"items": [{ITEM[:-1]}, "columns": {{"a": 1e999}}}}]}}', JSON, 422,
         "body: a number is more than a double holds"),
        (f'{{"items": [{ITEM[:-1]}, "columns": {{"a": {"1" * 5000}}}}}]}}', JSON, 422,
         "body: a number has too many digits"),
        ('{"items": [{"prompt": "\\ud83d", "completion": ""}]}', JSON, 422,
         "body: a string holds half of a surrogate pair"),
        ('{"items": [{"prompt": "", "completion": "", "columns": {"\\uDFFF": 1}}]}', JSON, 422,
         "body: a string holds half of a surrogate"),
        (b'{"items": [{"prompt": "\xff", "completion": ""}]}', JSON, 422, "body: byte 23 is not UTF-8"),
        ('{"items": [{"prompt": [{"role": "user", "content": ["hi"]}], "completion": ""}]}', JSON, 422,
         "content.str: Input should be a valid string"),
        ('{"items": [{"prompt": [], "completion": ""}]}', JSON, 422, "should have at least 1 item"),
        ("[1]", JSON, 422, "body: Input should be a valid dictionary"),
        (f'{{"items": [{", ".join([ITEM] * 1025)}]}}', JSON, 422,
         "body: items: 1025 items in one request, at most 1024"),
    ],
    ids=map(str, count()),  # the bodies are long
)  # fmt: skip
def test_what_is_no_json_is_told_by_its_own_name(
    body: str | bytes, headers: dict[str, str], status: int, said: str
) -> None:
    response = client().post("/v1/score", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (
        status,
        {415: "unsupported", 422: "invalid"}[status],
    )
    assert said in response.json()["error"]["message"]


def test_a_smiley_in_two_escapes_is_one_character() -> None:
    body = b'{"items": [{"prompt": "\\ud83d\\ude00", "completion": "a \\\\ud800 b"}]}'
    assert client().post("/v1/score", content=body, headers=JSON).json()["scores"][0]["parts"]["short"] == 0.5


def test_paths_and_methods_that_are_not_there() -> None:
    asked = client()
    for method, path, status, kind in (
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/nowhere", 404, "not_found"),
        ("GET", "/v1/score", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
        ("POST", "/v1/rewards", 405, "method_not_allowed"),
    ):
        response = asked.request(method, path)
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    for path in ("/healthz", "/readyz", "/v1/rewards"):
        assert (asked.head(path).status_code, asked.head(path).content) == (200, b"")


def test_the_whole_conversation_reaches_the_rewards() -> None:
    talk = [{"role": "system", "content": "brief"}, {"role": "user", "content": "1 + 1?"}]
    (item,) = items_of_score(ScoreRequest.model_validate({"items": [{"prompt": talk, "completion": "2"}]}))
    assert (item.prompt, item.messages, item.conversational) == ("1 + 1?", tuple(talk), True)
    parts = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}]
    spelt = [{"role": "system", "content": "brief"}, {"role": "user", "content": parts}]
    (item,) = items_of_score(ScoreRequest.model_validate({"items": [{"prompt": spelt, "completion": "2"}]}))
    assert (item.prompt, item.messages) == ("1 + 1?", tuple(talk))
    asked = GetRewardRequest.model_validate(
        {"query": ["a b", "c"], "prompts": ["a ", ""], "messages": [talk, None]}
    )
    first, second = items_of_get_reward(asked)
    assert (first.prompt, first.completion, first.messages, first.conversational) == (
        "a ",
        "b",
        tuple(talk),
        False,
    )
    assert (second.messages, second.conversational) == ((), False)
    slime = SlimeRequest.model_validate({"prompt": talk, "response": "2", "tokens": list(range(5000))})
    assert item_of_slime(slime).messages == tuple(talk)
    body = {"items": [{"prompt": [{"role": "user", "content": "x"}] * 50 + talk, "completion": "c"}]}
    response = client(config(limits={"max_characters": 61})).post("/v1/score", json=body)
    assert "item 0 has 62 characters, at most 61" in response.json()["error"]["message"]
    many = {"prompt": "p", "response": "a", "tokens": list(range(5000))}
    assert client().post("/slime?reward=short", json=many).json() == 1.0


@pytest.mark.parametrize("piece", [" ", "</s>", "\n</s>", "<|im_end|>", "<", "|>", "<|", "<|a", "\u3000"])
def test_the_end_of_a_text_is_found_in_linear_time(piece: str) -> None:
    text = "a" + piece * 60_000
    began = time.perf_counter()
    cut = ending_at(text), ending_at(text + "x")
    assert time.perf_counter() - began < 5  # 0.3 s; the backtracking regex took 26 s for a hundredth of it
    ends = piece.strip() in ("</s>", "<|im_end|>")
    assert cut == (1 if ends else len(text), len(text) + 1)


BACKTRACKING = re.compile(r"(?:\s*(?:<[|｜][^<>]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>))+\s*$")
PIECES = [
    "<|im_end|>",
    "</s>",
    "<eos>",
    "<end_of_turn>",
    " ",
    "\n",
    "a",
    "<",
    "|",
    ">",
    "｜",
    "<||>",
    "<|" + "x" * 40 + "|>",
    "<|" + "x" * 41 + "|>",
]


@given(lists(sampled_from(PIECES), max_size=7).map("".join))
def test_the_end_of_a_text_is_where_the_expression_finds_it(text: str) -> None:
    match = BACKTRACKING.search(text)
    assert ending_at(text) == (match.start() if match else len(text))


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(30)

    async def send(message: Any) -> None:
        sent.append(message)

    cfg = config(limits={"timeout_s": 0.05})
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "headers": [],
        "query_string": b"",
        "root_path": "",
    }
    asyncio.run(make_app(cfg, Here(cfg), None)(scope, never, send))
    assert sent[0]["status"] == 408
    assert b"limits.timeout_s" in sent[1]["body"]


def test_many_small_pieces_of_a_body_cost_no_more_than_their_bytes() -> None:
    pieces = (b"x" for _ in range(200_000))
    began = time.perf_counter()
    response = client(config(limits={"max_body_mib": 0.1})).post("/v1/score", content=pieces, headers=JSON)
    assert (response.status_code, time.perf_counter() - began < 20) == (413, True)


def test_the_in_flight_count_comes_back_down() -> None:
    asked = client(config(limits={"max_items_in_flight": 2, "timeout_s": 0.05}), Raising(None))
    for _ in range(3):
        assert (
            asked.post("/v1/score", json={"items": [{"prompt": "p", "completion": "c"}] * 2}).status_code
            == 504
        )


# ---- OpenAI's chat with the models of judges


def judges(*names: str) -> ServiceConfig:
    asked = [{"kind": "judge", "name": n, "path": "org/judge", "template": "strongreject"} for n in names]
    return config(rewards=[*REWARDS, *asked], limits={"max_characters": 100})


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": content}], **fields}


def test_judges_score_and_their_models_can_be_asked() -> None:
    asked = client(judges("strict"))
    scored = asked.post(
        "/v1/score", json={"items": [{"prompt": "p", "completion": "c"}], "rewards": ["strict"]}
    )
    assert scored.json()["scores"] == [{"score": 0.5, "parts": {"strict": 0.5}, "error": None}]
    assert asked.get("/v1/models").json() == {
        "object": "list",
        "data": [{"id": "strict", "object": "model", "created": 0, "owned_by": "frpo"}],
    }
    assert asked.get("/v1/models/strict").json() == asked.get("/v1/models").json()["data"][0]
    answer = asked.post(
        "/v1/chat/completions",
        json=said("one two three", model="strict", max_tokens=2, temperature=0, top_k=5),
    ).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert time.time() - answer.pop("created") < 60
    assert answer == {
        "object": "chat.completion",
        "model": "strict",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "strict at 0: one two"},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    }
    whole = asked.post("/v1/chat/completions", json=said("one two")).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("strict at 1: one two", "stop")


def test_a_model_that_is_no_judge_is_not_found() -> None:
    answer = client(judges("strict")).get("/v1/models/lenient")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found"
    assert "no judge is called 'lenient'" in answer.json()["error"]["message"]


def test_what_openai_lets_be_null_is_as_if_it_were_left_out() -> None:
    named = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "stream")
    nulls = dict.fromkeys((*named, "response_format", "model", "logprobs"))
    answer = client(judges("a")).post("/v1/chat/completions", json=said("one two", **nulls))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "a at 1: one two"
    asked = ChatRequest.model_validate(said("one two", **nulls))
    assert decoding_of(asked) == Decoding(None, temperature=1.0)


@pytest.mark.parametrize(
    ("names", "request_", "status", "message"),
    [
        ((), said("a"), 422, "no judge is called ''; GET /v1/models lists them"),
        (("a", "b"), said("a"), 422, "no judge is called ''"),
        (("a",), said("a", model="short"), 422, "no judge is called 'short'"),
        (("a",), said("x" * 101), 422, "messages: 102 characters, at most 100 (limits.max_characters)"),
        (("a",), said("a", n=2), 422, "body.n"),
        (("a",), said("a", n=True), 422, "body.n"),
        (("a",), said("a", stream=True), 422, "stream: the answer comes whole; leave it out"),
        (("a",), said("a", stream=0), 422, "body.stream"),
        (("a",), said("a", temperature="1"), 422, "body.temperature"),
        (("a",), said("a", max_tokens=0), 422, "body.max_tokens"),
        (("a",), {"messages": []}, 422, "body.messages"),
        (("a",), said("a", response_format={"type": "json_schema"}), 422, "json_schema belongs to type"),
        (("a",), said("a", response_format={"type": "json_object"}), 422, "body.response_format.type"),
        (
            ("a",),
            said("a", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "zzz"}}}),
            422,
            "the judge does not take this: no such schema",
        ),
        (("a",), said("slow"), 504, "not answered"),
    ],
)
def test_what_a_judge_is_not_asked(
    names: tuple[str, ...], request_: dict[str, Any], status: int, message: str
) -> None:
    answer = client(judges(*names)).post("/v1/chat/completions", json=request_)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_judge_needs_the_token_too() -> None:
    asked = client(judges("a"), digest=hashlib.sha256(b"t").digest())
    for answer in (
        asked.get("/v1/models"),
        asked.get("/v1/models/a"),
        asked.post("/v1/chat/completions", json=said("a")),
    ):
        assert answer.status_code == 401
    right = asked.post("/v1/chat/completions", json=said("a"), headers={"Authorization": "Bearer t"})
    assert right.status_code == 200
