"""`frpo watch` as a browser meets it: the page, what changes in it, who may see it, and how it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from frpo.config import ConfigError
from frpo.config.service import TOKEN_ENV
from frpo.metrics import RunLog
from frpo.records import Sample
from frpo.watch import server
from frpo.watch.folder import RunFolder
from frpo.watch.page import LivePage
from frpo.watch.server import bind_socket, digest_for, make_watch_app
from frpo.watch.view import RunView
from tests.support.builders import metrics
from tests.support.command_line import CommandLine
from tests.support.folders import RECIPE, write_first_arm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    with RunLog(tmp_path, RECIPE) as log:
        write_first_arm(log)
        yield log


@pytest.fixture
def ask(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.0)
    return TestClient(make_watch_app(RunFolder(log.folder), "127.0.0.1", None), base_url="http://127.0.0.1")


class Ids(HTMLParser):
    """Every id of a page, and what is opened and not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "link", "input", "path", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_page_has_a_section_of_each_record_and_loads_nothing(ask: TestClient) -> None:
    answer = ask.get("/")
    assert answer.status_code == 200
    page = Ids(answer.text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(RunView.model_fields) - {"name", "folder", "seed"} <= set(page.ids)
    assert not re.findall(r"""(?:src|href|action)="(?!data:)""", answer.text)
    assert "http://" not in answer.text.replace("http://www.w3.org", "")
    assert "testbed · seed 0" in answer.text
    assert "0.775" in answer.text  # mean reward of ten steps


def test_only_what_has_changed_is_sent(ask: TestClient, log: RunLog) -> None:
    first = ask.get("/changes?after=0").json()
    assert set(first["sections"]) == set(RunView.model_fields) - {"name", "folder", "seed"}
    assert ask.get(f"/changes?after={first['version']}").status_code == 204
    log.logger.info("a word")
    second = ask.get(f"/changes?after={first['version']}").json()
    assert set(second["sections"]) == {"now", "log"}
    assert "a word" in second["sections"]["log"]
    log.begin("rlhf/frpo", 20)
    log.step("rlhf/frpo", metrics(1))
    third = ask.get(f"/changes?after={second['version']}").json()
    assert {"now", "arms", "curves", "plane", "phases", "stages"} <= set(third["sections"])
    assert not {"measured", "samples", "drawn", "warnings"} & set(third["sections"])
    # a page that an earlier process gave out gets everything
    assert set(ask.get("/changes?after=999").json()["sections"]) == set(first["sections"])
    assert set(ask.get("/changes?after=x").json()["sections"]) == set(first["sections"])


def test_a_page_of_an_earlier_process_gets_everything(ask: TestClient, log: RunLog) -> None:
    before = ask.get("/changes?after=0").json()
    later = TestClient(make_watch_app(RunFolder(log.folder), "127.0.0.1", None), base_url="http://127.0.0.1")
    for word in ("one", "two", "three"):
        log.logger.info(word)
        assert later.get("/changes?after=0").status_code == 200
    news = later.get(f"/changes?after={before['version']}").json()
    assert set(news["sections"]) == set(before["sections"])


def test_words_of_models_are_text(ask: TestClient, log: RunLog) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    log._write_samples("drawn", "rlhf/grpo", 1, [Sample(task="t", prompt=evil, completion=evil, reward=1.0)])
    log.logger.info("%s", evil)
    answer = ask.get("/")
    assert evil not in answer.text
    assert answer.text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    policy = answer.headers["content-security-policy"]
    (nonce,) = re.findall(r"script-src 'nonce-([^']+)'", policy)
    assert f'<script nonce="{nonce}">' in answer.text
    assert "default-src 'none'" in policy
    assert ask.get("/").headers["content-security-policy"] != policy


def test_a_folder_without_anything_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    app = make_watch_app(RunFolder(tmp_path), "127.0.0.1", None)
    answer = TestClient(app, base_url="http://localhost").get("/")
    assert "Not begun yet" in answer.text


def test_sections_that_say_the_same_are_not_drawn_again(log: RunLog) -> None:
    from frpo.watch.describe import describe_run

    run, page = RunFolder(log.folder), LivePage()
    run.refresh()
    page.show(describe_run(run, 0.0))
    drawn = page.drawings["curves"].html
    page.show(describe_run(run, 0.0))
    assert page.drawings["curves"].html is drawn
    assert page.changes(page.version - 1).sections == {}


# ---- who may see it


def test_pages_of_other_sites_are_not_answered(ask: TestClient) -> None:
    assert ask.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert ask.get("/changes", headers={"Host": "evil.example:8000"}).status_code == 400
    assert ask.get("/", headers={"Host": "localhost:8000"}).status_code == 200


def test_the_address_that_is_printed_is_answered_over_ipv6_too(log: RunLog) -> None:
    app = make_watch_app(RunFolder(log.folder), "::1", None)
    client = TestClient(app, base_url="http://[::1]:8123")
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "[::2]:8123"}).status_code == 400


def test_a_token_is_the_password(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "s3cret")
    app = make_watch_app(RunFolder(log.folder), "0.0.0.0", digest_for("0.0.0.0"))
    client = TestClient(app)
    for path in ("/", "/changes"):
        refused = client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic realm=")
        assert client.get(path, auth=("anybody", "s3cret")).status_code == 200
        assert client.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get(path, auth=("anybody", "wrong")).status_code == 401


def test_without_a_token_it_is_for_loopback_alone(
    monkeypatch: pytest.MonkeyPatch, log: RunLog, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    assert [digest_for(host) for host in ("127.0.0.1", "localhost", "::1")] == [None] * 3
    said = CommandLine(monkeypatch, capsys).refuses("watch", str(log.folder), "--host", "0.0.0.0")
    assert said.startswith(
        f"--host: 0.0.0.0 shows the run to whoever reaches it; export a token as {TOKEN_ENV}"
    )


def test_a_port_that_is_taken_is_refused() -> None:
    with bind_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} on 127.0.0.1 is taken"):
            bind_socket("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host, --port: 192\.0\.2\.1:0 can't be bound"):
        bind_socket("192.0.2.1", 0)


@pytest.mark.parametrize(
    "make",
    [lambda folder: folder / "nowhere", lambda folder: folder],
    ids=["nowhere", "no run"],
)
def test_a_folder_that_is_no_run_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    make: Callable[[Path], Path],
) -> None:
    assert CommandLine(monkeypatch, capsys).refuses("watch", str(make(tmp_path))).startswith("watch: ")


@pytest.mark.long
def test_it_serves_until_it_is_interrupted_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    # closed, since TensorBoard's writer writes what it holds some time later
    with RunLog(tmp_path, RECIPE) as log:
        write_first_arm(log)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    command = [sys.executable, "-m", "frpo", "watch", str(tmp_path)]
    # in the background a shell would have it ignore the interrupt
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert watch.stdout is not None
    try:
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", watch.stdout.readline())
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"seed 0" in answer.read()
        idle = socket.create_connection(("127.0.0.1", int(url.split(":")[2].rstrip("/"))))
        watch.send_signal(signal.SIGINT)
        out, _ = watch.communicate(timeout=20)
        idle.close()
    finally:
        watch.kill()
    assert (watch.returncode, out) == (0, "Stopped watching; the run goes on.\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
