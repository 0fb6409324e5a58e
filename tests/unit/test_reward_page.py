"""docs/rewards.md: every ready-made reward stands there, and each row of its tables is what the function
gives."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, get_args

import pytest

from frpo import rewards
from frpo.config import FunctionReward, RewardConfig
from frpo.rewards import code, gym, judge
from frpo.rewards.calling import FunctionScorer
from frpo.rewards.parts import part_of
from frpo.rewards.signature_checks import check_signature
from frpo.types import Item
from tests.support.pages import Table, code_in, read_tables

TABLES = {table.section: table for table in read_tables("rewards.md")}
FUNCTIONS = {name: table for name, table in TABLES.items() if name.startswith("frpo.")}
ENDPOINTS = ("frpo.rewards.judge:strongreject", "frpo.rewards.judge:moderation")
HALF = {
    "entry_point": "half",
    "canonical_solution": "def half(xs):\n    return [x / 2 for x in xs]\n",
    "base_input": [[[2, 4]], [[]]],
    "plus_input": [],
}
"""The row of the page's code."""
PLAIN = [name for name in FUNCTIONS if name not in (*ENDPOINTS, "frpo.rewards:reasoning_gym")]


def rows_of(table: Table) -> Iterator[tuple[dict[str, Any], Any]]:
    """(cell by heading, reward) of each row; an empty cell is none, a failed reward the word."""
    for row in table.rows:
        cells = {name: value_in(cell) for name, cell in zip(table.header, row, strict=True) if cell}
        yield cells, cells.pop("reward")


def value_in(cell: str) -> Any:
    return ast.literal_eval(code_in(cell)[0]) if code_in(cell) else cell


def score(function: str, completion: str, columns: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """What a run has for one completion; the word for a failed reward."""
    reward = FunctionReward(kind="function", name="r", function=function, arguments=arguments)
    check_signature(reward, columns.keys(), "rewards.0")
    item = Item("a prompt", completion, "", columns)
    value, error = part_of(FunctionScorer(reward, "rewards.0")([item])[0], reward)
    return "failed" if error else value


def test_the_page_has_every_ready_made_reward() -> None:
    ready_made = set[str]()
    for module in (rewards, code, gym, judge):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and hasattr(value, "reads_text"):
                ready_made.add(f"{value.__module__}:{name}")
    assert set(FUNCTIONS) == {name.replace("frpo.rewards.gym:", "frpo.rewards:") for name in ready_made}


def test_the_page_has_every_kind() -> None:
    sections = get_args(get_args(RewardConfig)[0])
    kinds = [get_args(section.model_fields["kind"].annotation)[0] for section in sections]
    assert [code_in(cell)[0] for cell in TABLES["Kinds"].column("kind")] == kinds


@pytest.mark.parametrize("name", PLAIN)
def test_a_function_gives_what_its_table_says(name: str) -> None:
    if name.endswith(":evalplus") and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed; code never runs without it")
    given = dict[str, Any]()
    columns: dict[str, Any] = {"answer": None}
    if name.endswith(":evalplus"):
        given, columns = {"allow_code_execution": True, "timeout_s": 2.0}, HALF
    for cells, expected in rows_of(FUNCTIONS[name]):
        arguments = {code_in(head)[0]: cells[head] for head in cells if head.startswith("argument ")}
        own = {code_in(head)[0]: cells[head] for head in cells if head.startswith("column ")}
        if "column" in cells:  # the one that the argument names
            own = {arguments.get("column", "answer"): cells["column"]}
        found = score(name, cells["completion"], columns | own, given | arguments)
        assert found == (expected if expected in (None, "failed") else pytest.approx(expected)), cells


def test_what_reasoning_gym_scores() -> None:
    table = FUNCTIONS["frpo.rewards:reasoning_gym"]
    for completion, scored in table.rows:
        assert gym.answer_in(value_in(completion)) == value_in(scored)


class Endpoint(BaseHTTPRequestHandler):
    reply: Any = None

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = {
            "/v1/chat/completions": {"choices": [{"message": {"content": self.reply}}]},
            "/v1/moderations": {"results": [{"category_scores": self.reply}]},
        }[self.path]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("name", ENDPOINTS)
def test_an_endpoint_s_answer_becomes_what_the_table_says(name: str) -> None:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    arguments = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m"}
    try:
        for cells, expected in rows_of(FUNCTIONS[name]):
            (Endpoint.reply,) = cells.values()
            assert score(name, "a completion", {}, arguments) == expected, cells
    finally:
        server.shutdown()
