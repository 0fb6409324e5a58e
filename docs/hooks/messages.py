"""The last part of docs/troubleshooting.md, made from the source: `make messages` writes it anew.

A message is a text that an exception is made of, or one that says what to do; it is linked to the section
that explains it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("frpo", "actors", "deploy")
VARIES = "…"
TITLE = "## Every message"
HEAD = f"""{TITLE}

What frpo raises and what it advises, by the file that says it. One without a link says itself what to change.
`make messages` writes this part.
"""
RAISED = re.compile(
    r"(?<!Assertion)(Error|Exception|Failed|Stopped|Missing|Offline|InUse|Cached|[dD]ied)$|_error_at$"
)
"""Names of what is called with a message, most of them exceptions."""
ADVISED = re.compile(
    r"(^|; |: )(accept|choose|download|export|give|install|keep|leave|look|lower|make|mend|name|put|raise"
    r"|rename|save|send|set|submit|take|unset|use|write)\b"
)
WORD = re.compile(r"[A-Za-z]{2,}")
FEWEST_WORDS = {ast.Constant: 3, ast.JoinedStr: 2}
"""Of a text that tells a reader where he is."""


def write_part(by_hand: str) -> str:
    """The part that follows those written by hand, which explain some of its messages."""
    explained, lines = dict(sections_of(by_hand)), [HEAD]
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text())
            messages = sorted(set(messages_of(tree)))
            if messages:
                about = " ".join((ast.get_docstring(tree) or "").split()).partition(". ")[0]
                lines += [f"**`{file.relative_to(ROOT)}`**: {about.rstrip('.')}.", ""]
                lines += [f"- {in_code(each)}{link_of(each, explained)}" for each in messages]
                lines.append("")
    return "\n".join(lines)


def sections_of(by_hand: str) -> Iterator[tuple[str, str]]:
    """(message, title of the section that explains it)."""
    for section in re.split(r"^#{2,3} ", by_hand, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for block in re.findall(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            yield from ((message, title) for message in block.splitlines())


def messages_of(tree: ast.Module) -> Iterator[str]:
    nodes, skipped, raised = list(ast.walk(tree)), set[ast.AST](), set[ast.AST]()
    for node in nodes:
        match node:
            case ast.JoinedStr(values=pieces):
                skipped |= set(pieces)
            case ast.Expr(value=docs) | ast.keyword(arg="help", value=docs):
                skipped.add(docs)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if RAISED.search(name):
                raised |= set(ast.walk(node))
    for node in nodes:
        text = "" if node in skipped else template_of(node)
        says_much = len(WORD.findall(text)) >= FEWEST_WORDS.get(type(node), 0)
        if text and says_much and (node in raised or ADVISED.search(text)):
            yield text.strip()


def template_of(node: ast.AST) -> str:
    """A text of the source with a mark for what is put into it; empty for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        pieces = (template_of(part) if isinstance(part, ast.Constant) else VARIES for part in node.values)
        return re.sub(rf"{VARIES}+", VARIES, "".join(pieces))
    return ""


def stands_in(message: str, template: str) -> bool:
    """Whether the template has the message's words, in order."""
    place = 0
    for words in message.split(VARIES):
        place = template.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return True


def in_code(message: str) -> str:
    text = " ".join(message.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def link_of(message: str, explained: dict[str, str]) -> str:
    found = [words for words in explained if stands_in(words, message)]
    if not found:
        return ""
    title = explained[max(found, key=len)]
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    return f" ([{title}](#{anchor}))"


if __name__ == "__main__":
    by_hand = PAGE.read_text().partition(TITLE)[0].rstrip()
    PAGE.write_text(f"{by_hand}\n\n{write_part(by_hand)}")
