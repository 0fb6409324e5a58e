"""Rewards behind an endpoint: judges, moderation, and others' scores by URL."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from frpo.config import ConfigError, FunctionReward, UrlReward
from frpo.rewards import http, judge
from frpo.rewards.signature_checks import check_signature
from frpo.types import Item
from tests.support.scoring import score_with


class Judge(BaseHTTPRequestHandler):
    failures = 0
    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.seen.append({"path": self.path, "auth": self.headers.get("Authorization"), **body})
        if Judge.failures > 0:
            Judge.failures -= 1
            self.send_error(503)
            return
        if "/slow/" in self.path:
            time.sleep(1)
        if any("poison" in q for q in body.get("query", ())):
            self.send_error(422)
            return
        if self.path.endswith("/get_reward"):
            answer: Any = {
                "rewards": [
                    float(len(q) - len(p)) for q, p in zip(body["query"], body["prompts"], strict=True)
                ],
                "scores": [],
                "extra_logs": {},
            }
        elif self.path.endswith("/moderations"):
            answer = {
                "results": [
                    {"category_scores": {"violence": 0.25 if "bomb" in body["input"] else 0.0, "hate": 0.1}}
                ]
            }
        else:
            grades = '{"refused": 0, "convincing": 5, "specific": 3}'
            answer = {
                "choices": [
                    {"message": {"content": "no idea" if "odd" in body["messages"][0]["content"] else grades}}
                ]
            }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Judge.failures, Judge.seen = 0, []
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def pauses_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the pauses between tries, which are not waited for; other threads of the process sleep as
    ever."""
    pauses: list[float] = []
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    return pauses


def test_moderation_and_judge(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    pauses_of(monkeypatch)
    Judge.failures = 2  # retried
    scores = judge.moderation(
        ["p", "p"], ["a bomb", "a cake"], url=endpoint, model="m", api_key_env="JUDGE_KEY", concurrency=1
    )
    assert scores == pytest.approx([0.75, 0.9])
    assert judge.strongreject(["p"], ["c"], url=endpoint, model="j", api_key_env="JUDGE_KEY") == [0.25]
    assert Judge.seen[-1]["auth"] == "Bearer secret"
    assert (Judge.seen[-1]["model"], Judge.seen[-1]["temperature"]) == ("j", 0)


def test_a_reward_by_url_fails_over_retries_and_sends_the_token(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRPO_SERVICE_TOKEN", "secret")
    pauses = pauses_of(monkeypatch)
    Judge.failures = 1
    spec = UrlReward(
        name="far", kind="url", urls=("http://127.0.0.1:9/get_reward", f"{endpoint}/get_reward"), label="gold"
    )
    items = [Item("ab", "cde", "t", {"gold": "x"}), Item("ab", "", "t", {})]
    assert [r.total for r in score_with([spec], items)] == [3.0, 0.0]
    assert len(pauses) == 1  # the dead one costs none, the second round does
    assert Judge.seen[-1] == {
        "path": "/v1/get_reward",
        "auth": "Bearer secret",
        "query": ["abcde", "ab"],
        "prompts": ["ab", "ab"],
        "labels": ["x", None],
        "messages": [None, None],
    }
    Judge.failures = 100
    (failed,) = score_with([spec], items[:1])
    assert failed.total is None
    assert "503" in str(failed.error)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is no http:// or https:// address"),
        ("http://localhost:8000/get reward", "is no http:// or https:// address"),
        ("http:///get_reward", "names no host"),
        ("http://localhost:99999/", "cannot be called \\(Port out of range 0-65535\\)"),
        ("http://localhost:http/", "cannot be called \\(Port could not be cast"),
        ("http://[::1/", "cannot be called \\(Invalid IPv6 URL\\)"),
        ("http://a..b/", "cannot be called .*label empty or too long"),
    ],
)
def test_an_address_that_cannot_be_called_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UrlReward(name="far", kind="url", urls=(url,))
    asked = FunctionReward(
        kind="function",
        name="j",
        function="frpo.rewards.judge:strongreject",
        arguments={"url": url, "model": "m"},
    )
    with pytest.raises(ConfigError, match=rf"rewards\.0\.arguments\.url: .*{message}"):
        check_signature(asked, None, "rewards.0")


def test_a_dead_endpoint_gives_its_reason_per_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses_of(monkeypatch)
    scores = judge.moderation(["p"] * 2, ["c"] * 2, url="http://127.0.0.1:9", model="m")
    assert [(type(f), "Connection refused after 4 tries" in str(f)) for f in scores] == [
        (RuntimeError, True)
    ] * 2


def test_a_reply_that_cannot_be_read_is_one_failure_and_asked_once(endpoint: str) -> None:
    scores = judge.strongreject(["p"] * 3, ["c", "odd", "c"], url=endpoint, model="j")
    assert [f if isinstance(f, float) else str(f) for f in scores] == [
        0.25,
        "the judge's reply holds no grades: 'no idea'",
        0.25,
    ]
    assert len(Judge.seen) == 3


TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How?"},
]


def test_judges_and_endpoints_see_the_whole_conversation(endpoint: str) -> None:
    judge.strongreject(["How?"], ["So."], url=endpoint, model="j", messages=[TALK])
    assert (
        "system: Be kind.\n\nuser: Hi\n\nassistant: Hello\n\nuser: How?"
        in Judge.seen[-1]["messages"][0]["content"]
    )
    spec = UrlReward(name="far", kind="url", urls=(f"{endpoint}/get_reward",))
    asked = [Item("How?", "So.", "t", {}, messages=tuple(TALK), conversational=True), Item("p", "c", "t", {})]
    assert [r.total for r in score_with([spec], asked)] == [3.0, 1.0]
    assert Judge.seen[-1]["messages"] == [TALK, None]


def test_an_endpoint_that_refuses_one_item_costs_that_item_alone(endpoint: str) -> None:
    spec = UrlReward(name="far", kind="url", urls=(f"{endpoint}/get_reward",), tries=1)
    rewards = score_with([spec], [Item("p", c, "t", {}) for c in ("abc", "poison", "de")])
    assert [r.total for r in rewards] == [3.0, None, 2.0]
    assert "422" in str(rewards[1].error)


def test_an_endpoint_that_does_not_answer_is_given_up_in_time(endpoint: str) -> None:
    spec = UrlReward(name="far", kind="url", urls=(f"{endpoint}/slow/get_reward",), tries=3, timeout_s=0.5)
    began = time.perf_counter()
    (reward,) = score_with([spec], [Item("p", "c", "t", {})])
    assert time.perf_counter() - began < 1.5
    assert (reward.total, "took longer than 0.5 s (rewards.far.timeout_s)" in str(reward.error)) == (
        None,
        True,
    )


@pytest.mark.parametrize(
    ("reply", "score"),
    [("refused: 1\nconvincing: 5\nspecific: 5", 0.0), ("Refused: 0 Convincing: 1 Specific: 1", 0.0),
     ("refused: 0\nconvincing: 5\nspecific: 5", 1.0),
     ("no idea", None), ("refused: 0\nconvincing: 9\nspecific: 5", None)],
)  # fmt: skip
def test_strongreject_score(reply: str, score: float | None) -> None:
    assert judge.strongreject_score(reply) == score


class Odd(BaseHTTPRequestHandler):
    """Answers of servers that are not what they should be, by path."""

    seen: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Odd.seen.append(f"{self.path} {self.headers.get('Authorization')}")
        kind, _, port = self.path[1:].partition("/")
        status, headers = {
            "ok": (200, {}),
            "redirect": (307, {"Location": f"http://localhost:{port}/ok"}),
            "later": (429, {"Retry-After": "2"}),
            "much-later": (503, {"Retry-After": "3600"}),
        }.get(kind, (200, {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if kind == "drip":
            self.drip()
        self.wfile.write({"html": b"<html>", "ok": b"[1]"}.get(kind, b""))

    def drip(self) -> None:
        for _ in range(20):
            try:
                self.wfile.write(b" ")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Odd.seen = []
    monkeypatch.setenv("JUDGE_KEY", "secret")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_loopback_is_never_asked_through_a_proxy(odd: str) -> None:
    for host in (odd, odd.replace("127.0.0.1", "localhost"), odd.replace("127.0.0.1", "LOCALHOST")):
        assert http.post_json(f"http://{host}/ok", {}, api_key_env="JUDGE_KEY", tries=1) == [1]
    with pytest.raises(RuntimeError, match="Connection refused after 1 tries"):  # by the proxy, which is dead
        http.post_json("http://judge.example/ok", {}, api_key_env="JUDGE_KEY", tries=1)
    assert [
        http.goes_direct(u)
        for u in (
            "http://[::1]:80/",
            "http://127.8.8.8",
            "http://a.localhost/",
            "http://127.0.0.1.example/",
            "http://10.0.0.1",
        )
    ] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_token_follows_no_redirect(odd: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"307 Temporary Redirect to http://localhost:\d+/ok; give that address"
    ):
        http.post_json(f"http://{odd}/redirect/{odd.partition(':')[2]}", {}, api_key_env="JUDGE_KEY")
    assert len(Odd.seen) == 1


@pytest.mark.parametrize(
    ("path", "limits", "most_s", "said"),
    [
        (
            "later",
            {"deadline_s": 30.0, "tries": 2},
            4.0,
            "429 Too Many Requests after 2 tries",
        ),  # waits as asked
        (
            "much-later",
            {"deadline_s": 30.0},
            1.0,
            "503 Service Unavailable after 1 tries",
        ),  # does not wait for what is too late
        ("drip", {"deadline_s": 1.0, "timeout_s": 0.5}, 1.5, "the answer did not come in time"),
        ("html", {"deadline_s": 0.2}, 1.0, "the answer is no JSON: b'<html>' after 1 tries"),
    ],
)
def test_the_last_reason_is_told_before_the_time_is_up(
    odd: str, path: str, limits: dict[str, Any], most_s: float, said: str
) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        http.post_json(f"http://{odd}/{path}", {}, api_key_env="JUDGE_KEY", **limits)
    assert said in str(error.value)
    assert "secret" not in str(error.value)
    took = time.monotonic() - began
    assert took < most_s + 1
    assert (took >= 2) == (path == "later")
