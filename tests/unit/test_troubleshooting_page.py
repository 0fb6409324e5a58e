"""docs/troubleshooting.md has every message of the source, and explains none that is not there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import pytest

from tests.support.pages import ROOT, load_hook

messages: ModuleType = load_hook("messages")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
BY_HAND, TITLE, LISTED = PAGE.partition(messages.TITLE)
EXPLAINED = [message for message, _ in messages.sections_of(BY_HAND)]
FEWEST = 8
"""Letters that a message must keep to be told from others."""


def read_trees() -> Iterator[ast.Module]:
    for folder in messages.FOLDERS:
        yield from (ast.parse(file.read_text()) for file in (ROOT / folder).rglob("*.py"))


@cache
def templates() -> frozenset[str]:
    found = set[str]()
    for tree in read_trees():
        nodes = set(ast.walk(tree))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        found |= set(map(messages.template_of, nodes - docstrings))
    return frozenset(found - {""})


@pytest.mark.parametrize("message", EXPLAINED)
def test_a_message_that_is_explained_is_one_of_the_source(message: str) -> None:
    assert len(re.sub(r"\W", "", message)) >= FEWEST
    assert any(messages.stands_in(message, template) for template in templates()), message


def test_the_page_explains_what_users_meet_first() -> None:
    assert len(EXPLAINED) > 90
    assert len(set(EXPLAINED)) == len(EXPLAINED)


def test_the_page_lists_the_messages_of_the_source_and_no_others() -> None:
    assert messages.write_part(BY_HAND) == TITLE + LISTED, "run: make messages"
    assert LISTED.count("\n- `") > 400


def test_every_error_that_is_raised_with_a_text_stands_on_the_page() -> None:
    """Looked for in another way than the list is made."""
    texts = set[str]()
    for tree in read_trees():
        for node in ast.walk(tree):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=kind), args=[text, *_])) if kind in (
                    "ConfigError",
                    "Missing",
                    "RunStopped",
                    "WorkerFailed",
                ):
                    texts.add(messages.template_of(text))
    said = {text for text in texts if len(re.findall("[A-Za-z]{2,}", text)) > 1}
    assert len(said) > 200
    assert {text for text in said if messages.in_code(text) not in LISTED} == set()


def test_a_message_is_what_is_raised_or_says_what_to_do_and_leads_to_where_it_is_explained() -> None:
    source = '''
"""Raises ValueError; give it none."""
REMEDY = "look at the network, or wait"
if not path:
    print("reading all of the files")
    raise ConfigError(f"data set {path!r}: {why or 'it is gone'}{more}; {REMEDY}")
option = typer.Option(help="a folder; give one that is there")
'''
    found = sorted(messages.messages_of(ast.parse(source)))
    assert found == ["data set …: …; …", "it is gone", "look at the network, or wait"]
    by_hand = "## Data, first\n\n```text\ndata set …: …\n```\n\n## Other\n\n```text\nanother\n```\n"
    explained = dict(messages.sections_of(by_hand))
    assert explained == {"data set …: …": "Data, first", "another": "Other"}
    assert messages.link_of(found[0], explained) == " ([Data, first](#data-first))"
    assert messages.link_of(found[1], explained) == ""
    assert messages.in_code("`frpo run`\n  again") == "`` `frpo run` again ``"


def test_a_message_that_is_not_in_the_source_is_seen() -> None:
    message = "… died during …"
    assert messages.stands_in(message, "… died during …(): …")
    assert not messages.stands_in(message, "… died before …")
    assert not messages.stands_in("… died before it began", "… died before …")
