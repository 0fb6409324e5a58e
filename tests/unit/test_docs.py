"""What the pages of docs name is there."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_every_test_that_holds_an_invariant_is_there() -> None:
    named = re.findall(r"((?:ray|unit|contract)/test_\w+\.py)(?:::(test_\w+))?", PAGE)
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), (file, test)


def test_every_file_and_function_of_the_journeys_is_there() -> None:
    source = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in chain((ROOT / "frpo").rglob("*.py"), (ROOT / "actors").rglob("*.py"))
    }
    files = re.findall(r"\b(?:frpo|actors)/[\w/]+\.py", PAGE)
    assert len(files) > 10
    assert set(files) <= set(source)
    journeys = PAGE.partition("## Seven journeys")[2].partition("## Words")[0]
    functions = set(re.findall(r"`(?:[\w/]+\.)?(?:\w+\.)?(\w+)`", journeys)) - {
        "py",
        "forecast",
    }  # files and modules
    assert len(functions) > 20
    everything = "\n".join(source.values())
    assert [
        name
        for name in functions
        if not re.search(rf"\b(?:def|class) {name}\b|\b{name}\b = |\b{name}: ", everything)
    ] == []
