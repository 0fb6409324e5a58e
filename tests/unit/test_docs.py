"""What the pages of docs name is there."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest

from frpo.config import Config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FILES = chain((ROOT / "frpo").rglob("*.py"), (ROOT / "actors").rglob("*.py"))
SOURCE = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}


def test_every_test_that_holds_an_invariant_is_there() -> None:
    named = re.findall(r"((?:ray|unit|contract)/test_\w+\.py)(?:::(test_\w+))?", PAGE)
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), (file, test)


def test_every_file_and_function_of_the_journeys_is_there() -> None:
    files = re.findall(r"\b(?:frpo|actors)/[\w/]+\.py", PAGE)
    assert len(files) > 10
    assert set(files) <= set(SOURCE)
    journeys = PAGE.partition("## Seven journeys")[2].partition("## Words")[0]
    functions = set(re.findall(r"`(?:[\w/]+\.)?(?:\w+\.)?(\w+)`", journeys)) - {
        "py",
        "forecast",
    }  # files and modules
    assert len(functions) > 20
    everything = "\n".join(SOURCE.values())
    assert [
        name
        for name in functions
        if not re.search(rf"\b(?:def|class) {name}\b|\b{name}\b = |\b{name}: ", everything)
    ] == []


@pytest.mark.parametrize("page", ["AGENTS.md", "docs/architecture.md"])
def test_what_a_page_names_by_its_module_is_defined_there(page: str) -> None:
    named = re.findall(r"`([a-z_/]+)\.(?!py`|md`|toml`)(\w+)(?:\.\w+)*`", (ROOT / page).read_text())
    of_modules = [(module, name) for module, name in named if module not in Config.model_fields]
    assert len(of_modules) > 1
    for module, name in of_modules:
        ending = re.compile(rf"/{module}(/__init__)?\.py$")
        texts = [text for file, text in SOURCE.items() if ending.search(file)]
        definition = re.compile(rf"^(class|def) {name}\b|^{name}\b.* = ", re.MULTILINE)
        assert any(definition.search(text) for text in texts), f"{page}: {module}.{name}"
