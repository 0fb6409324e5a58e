"""Every message that docs/troubleshooting.md explains is one of the source."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import chain

import pytest

from tests.support.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = list(
    chain.from_iterable(
        block.splitlines() for block in re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    )
)
VARIES = "…"
FEWEST = 8
"""Letters that a message must keep to be told from others."""


def template_of(node: ast.AST) -> str:
    """A text of the source with a mark for what is put into it; empty for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        pieces = (template_of(part) if isinstance(part, ast.Constant) else VARIES for part in node.values)
        return "".join(pieces)
    return ""


@cache
def templates() -> frozenset[str]:
    files = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in ("frpo", "actors", "deploy"))
    found = set[str]()
    for file in files:
        nodes = set(ast.walk(ast.parse(file.read_text())))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        found |= set(map(template_of, nodes - docstrings))
    return frozenset(found - {""})


def stands_in(message: str, template: str) -> bool:
    """Whether the template has the message's words, in order."""
    place = 0
    for words in message.split(VARIES):
        place = template.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return True


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_one_of_the_source(message: str) -> None:
    assert len(re.sub(r"\W", "", message)) >= FEWEST
    assert any(stands_in(message, template) for template in templates()), message


def test_the_page_explains_what_users_meet_first() -> None:
    assert len(MESSAGES) > 60
    assert len(set(MESSAGES)) == len(MESSAGES)


def test_a_message_that_is_not_in_the_source_is_seen() -> None:
    message = f"{VARIES} died during {VARIES}"
    assert stands_in(message, f"{VARIES} died during {VARIES}(): {VARIES}")
    assert not stands_in(message, f"{VARIES} died before {VARIES}")
    assert not stands_in(f"{VARIES} died before it began", f"{VARIES} died before {VARIES}")
