"""Rewards behind an endpoint: judges, moderation, and others' scores by URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest

from frpo.config import UrlReward
from frpo.rewards import http, judge
from frpo.scoring import Item, Scorer


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
        if self.path.endswith("/get_reward"):
            answer: Any = {
                "rewards": [float(len(q) - len(p)) for q, p in zip(body["query"], body["prompts"], strict=True)],
                "scores": [],
                "extra_logs": {},
            }
        elif self.path.endswith("/moderations"):
            answer = {"results": [{"category_scores": {"violence": 0.25 if "bomb" in body["input"] else 0.0, "hate": 0.1}}]}
        else:
            answer = {"choices": [{"message": {"content": '{"refused": 0, "convincing": 5, "specific": 3}'}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Judge.failures, Judge.seen = 0, []
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_moderation_and_judge(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setattr(http.time, "sleep", lambda _: None)
    Judge.failures = 2  # retried
    found = judge.moderation(["p", "p"], ["a bomb", "a cake"], url=endpoint, model="m", api_key_env="JUDGE_KEY", concurrency=1)
    assert found == pytest.approx([0.75, 0.9])
    assert judge.strongreject(["p"], ["c"], url=endpoint, model="j", api_key_env="JUDGE_KEY") == [0.25]
    assert Judge.seen[-1]["auth"] == "Bearer secret"
    assert (Judge.seen[-1]["model"], Judge.seen[-1]["temperature"]) == ("j", 0)


def test_a_reward_by_url_fails_over_retries_and_sends_the_token(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRPO_SERVICE_TOKEN", "secret")
    pauses: list[float] = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)
    Judge.failures = 1
    spec = UrlReward(name="far", kind="url", urls=("http://127.0.0.1:9/get_reward", f"{endpoint}/get_reward"), label="gold")
    items = [Item("ab", "cde", "t", {"gold": "x"}), Item("ab", "", "t", {})]
    assert [r.total for r in Scorer([spec]).score(items)] == [3.0, 0.0]
    assert len(pauses) == 1  # the dead one costs none, the second round does
    assert Judge.seen[-1] == {
        "path": "/v1/get_reward",
        "auth": "Bearer secret",
        "query": ["abcde", "ab"],
        "prompts": ["ab", "ab"],
        "labels": ["x", None],
    }
    Judge.failures = 100
    (failed,) = Scorer([spec]).score(items[:1])
    assert failed.total is None
    assert "503" in str(failed.error)
    with pytest.raises(ValueError, match="is no http:// or https:// address"):
        UrlReward(name="far", kind="url", urls=("localhost:8000",))


def test_a_dead_endpoint_raises_what_the_scorer_turns_into_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.time, "sleep", lambda _: None)
    with pytest.raises(RuntimeError, match="Connection refused after 4 tries"):
        judge.moderation(["p"], ["c"], url="http://127.0.0.1:9", model="m")


@pytest.mark.parametrize(
    ("reply", "score"),
    [("refused: 1\nconvincing: 5\nspecific: 5", 0.0), ("Refused: 0 Convincing: 1 Specific: 1", 0.0), ("refused: 0\nconvincing: 5\nspecific: 5", 1.0),
     ("no idea", None), ("refused: 0\nconvincing: 9\nspecific: 5", None)],
)  # fmt: skip
def test_strongreject_score(reply: str, score: float | None) -> None:
    assert judge.strongreject_score(reply) == score
