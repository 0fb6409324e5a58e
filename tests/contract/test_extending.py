"""docs/extending.md holds: its diffs apply, its files and recipes load, its tests pass, and what it says is
never touched is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from frpo.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
TITLES = [
    "A reward",
    "A data source",
    "An estimator",
    "A penalty",
    "A stage",
    "A transport",
    "An actor",
    "A number in metrics.jsonl",
]
MOST_LINES = 24
"""Added and removed by the diff of a recipe."""


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    """Path of the file that it is; empty for diffs and commands."""
    text: str

    @property
    def paths(self) -> set[str]:
        """Files of the repository that it writes or changes."""
        return {self.title} if self.title else set(re.findall(r"^\+\+\+ b/(\S+)$", self.text, re.MULTILINE))

    @property
    def is_test(self) -> bool:
        return Path(self.title).name.startswith("test_")


@dataclass(frozen=True)
class Recipe:
    """One section of the page."""

    title: str
    text: str

    @property
    def blocks(self) -> list[Block]:
        return [Block(*parts) for parts in BLOCK.findall(self.text)]

    @property
    def changed_lines(self) -> list[str]:
        diffs = "".join(block.text for block in self.blocks if block.language == "diff")
        return re.findall(r"^[+-](?![+-]{2} ).*$", diffs, re.MULTILINE)

    def paths_after(self, words: str) -> set[str]:
        """Those that a paragraph names which begins with these words."""
        paragraph = re.search(rf"^\*\*{words}\*\*: (.+?)\n\n", self.text, re.MULTILINE | re.DOTALL)
        assert paragraph, (self.title, words)
        return set(re.findall(r"`([\w./]+)`", paragraph[1]))


RECIPES = [Recipe(*section.split("\n", 1)) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]]
BLOCKS = list(chain.from_iterable(recipe.blocks for recipe in RECIPES))
EACH = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.title)


def test_the_page_has_the_eight_recipes_and_no_other_code() -> None:
    assert [recipe.title for recipe in RECIPES] == TITLES
    assert len(BLOCKS) == len(re.findall(r"^```\w", PAGE, re.MULTILINE))
    assert {(block.language, bool(block.title)) for block in BLOCKS} == {
        ("python", True),
        ("yaml", True),
        ("diff", False),
        ("bash", False),
    }


@EACH
def test_a_recipe_touches_the_files_that_it_names_and_none_that_it_says_is_never_touched(
    recipe: Recipe,
) -> None:
    touched = set(chain.from_iterable(block.paths for block in recipe.blocks))
    assert touched == recipe.paths_after("Files")
    never = recipe.paths_after("Never touched")
    assert never
    assert [path for path in never if not (ROOT / path).exists()] == []
    assert [path for path in touched if path.startswith(tuple(never))] == []


@EACH
def test_a_recipe_is_short_and_has_a_test_and_one_to_copy(recipe: Recipe) -> None:
    assert len(recipe.changed_lines) <= MOST_LINES
    assert any(block.is_test for block in recipe.blocks)
    models = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", recipe.text)
    assert models
    for file, name in models:
        assert f"def {name}(" in (ROOT / file).read_text(), (file, name)


@pytest.fixture(scope="module")
def extended_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with every recipe in it."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("frpo", "actors", "recipes", "tests/support"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, copy / name)
    for block in BLOCKS:
        if block.language == "diff":
            run(["git", "apply", "-"], copy, block.text)
        elif block.title:
            (copy / block.title).parent.mkdir(parents=True, exist_ok=True)
            (copy / block.title).write_text(block.text)
    return copy


def run(command: list[str], folder: Path, given: str = "") -> str:
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # half of the time would be theirs
    done = subprocess.run(command, cwd=folder, env=env, input=given, capture_output=True, text=True)
    assert done.returncode == 0, given + done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_tests_of_the_page_pass(extended_copy: Path) -> None:
    tests = [block for block in BLOCKS if block.is_test]
    assert [block.title for block in tests if (ROOT / block.title).exists()] == []
    printed = run([sys.executable, "-m", "pytest", "-q", *(block.title for block in tests)], extended_copy)
    assert f"{sum(block.text.count('def test_') for block in tests)} passed" in printed


@pytest.mark.long
def test_the_commands_and_recipes_of_the_page_work(
    extended_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = "".join(block.text for block in BLOCKS if block.language == "bash").splitlines()
    assert commands
    for command in commands:
        program, *arguments = command.split()
        assert program == "frpo"
        run([sys.executable, "-m", "frpo", *arguments], extended_copy)
    monkeypatch.chdir(extended_copy)
    recipes = [Path(block.title) for block in BLOCKS if block.language == "yaml"]
    assert [load_recipe(recipe).name for recipe in recipes] == [recipe.stem for recipe in recipes]
