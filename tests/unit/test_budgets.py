"""What this code allows itself, read from its source: whoever goes beyond a budget is told where."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from frpo.config import Config

ROOT = Path(__file__).parents[2]
COLUMNS = 110
FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 7
CONFIG_PATHS = 358
"""Every one is a question to the user: one more needs one less, or a reason here.

The last 64: a judge's template, dtype and engine (eight), who pays a penalty (nine), ema and sam of every
training (ten), what protects a fine-tune and its adapters (seven), the grid of an audit with the data that is
mixed in (28), mix of a fine-tune (one), the experiment of a second tracker (one). A judge's engine is nobody
else's, methods cannot be compared without the next three, and a grid is all that an audit asks.
"""
CUDA_FILES = 9
"""To become three: one that finds the device, one that hands out cards, one that is the doctor."""

MORE_PARAMETERS = {
    "audit": "its options are the command line's",
    "certify": "its options are the command line's",
    "evalplus": "its keywords are arguments in a recipe",
}
"""Functions whose parameters are a user's words."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True)
class Source:
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def module(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.module))

    def of_type(self, kind: Any) -> list[Any]:
        return [node for node in self.nodes if isinstance(node, kind)]

    def at(self, line: int, problem: str) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}: {problem}"


def read_sources(*folders: str) -> list[Source]:
    sources: list[Source] = []
    for folder in folders:
        sources += [Source(path) for path in sorted((ROOT / folder).rglob("*.py"))]
    return sources


CODE = read_sources("frpo", "actors", "deploy")
TESTS = read_sources("tests")
EVERYTHING = [*CODE, *TESTS, *read_sources("benchmarks", "docs", "examples", "recipes")]


def find_long_lines() -> Iterator[str]:
    for source in EVERYTHING:
        for number, line in enumerate(source.text.splitlines(), 1):
            if len(re.sub(r"  # (type: ignore|noqa).*", "", line)) > COLUMNS:
                yield source.at(number, f"{len(line)} columns, more than {COLUMNS}")


def find_places_without_the_formatter() -> Iterator[str]:
    for source in EVERYTHING:
        for number, line in enumerate(source.text.splitlines(), 1):
            if re.search(r"#\s*fmt:\s*(skip|off)", line) and line[0] not in ")]}":
                yield source.at(number, "the formatter is off outside of a table of data")


def find_long_files() -> Iterator[str]:
    for source in CODE:
        lines = source.text.count("\n")
        if lines > FILE_LINES:
            yield source.at(1, f"{lines} lines, more than {FILE_LINES}")


def find_long_functions() -> Iterator[str]:
    for source in EVERYTHING:
        for function in source.of_type(Function):
            lines = function.end_lineno - function.lineno + 1
            if lines > FUNCTION_LINES:
                yield source.at(function.lineno, f"{function.name} has {lines} lines")


def find_many_parameters() -> Iterator[str]:
    for source in EVERYTHING:
        for function in source.of_type(Function):
            given = function.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > PARAMETERS and function.name not in MORE_PARAMETERS:
                yield source.at(function.lineno, f"{function.name} takes {count} parameters")


def find_crowded_comprehensions() -> Iterator[str]:
    for source in EVERYTHING:
        for node in source.of_type(Comprehension):
            conditions = sum(len(each.ifs) for each in node.generators)
            if len(node.generators) > 1 or conditions > 1:
                yield source.at(node.lineno, "a comprehension with more than one for or if")


def find_chained_conditionals() -> Iterator[str]:
    for source in EVERYTHING:
        for node in source.of_type(ast.IfExp):
            parts = (node.body, node.test, node.orelse)
            if any(isinstance(part, ast.IfExp) for part in parts):
                yield source.at(node.lineno, "a conditional expression inside another")


def find_two_of_one_name() -> Iterator[str]:
    """Public functions of modules, and classes, which capitals alone don't set apart."""
    places = defaultdict[str, list[str]](list)
    for source in CODE:
        for node in source.module.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                name = node.name.lower() if isinstance(node, ast.ClassDef) else f"{node.name}()"
                places[name].append(source.at(node.lineno, node.name))
    for several in places.values():
        if len(several) > 1:
            yield " and ".join(several)


def find_tests_that_import_tests() -> Iterator[str]:
    for source in TESTS:
        for node in source.of_type(ast.ImportFrom):
            if (
                node.module
                and node.module.startswith("tests.")
                and not node.module.startswith("tests.support")
            ):
                yield source.at(node.lineno, f"imports from {node.module}; move it to tests/support")


def find_more_cuda() -> Iterator[str]:
    files = [source.at(1, "cuda") for source in CODE if "cuda" in source.text]
    if len(files) > CUDA_FILES:
        yield from files


def find_more_settings() -> Iterator[str]:
    count = len(set(settable(Config)))
    if count > CONFIG_PATHS:
        yield f"{count} configuration paths can be set, more than {CONFIG_PATHS}"


def settable(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every path of a field that holds no fields itself; items of a list count once."""
    for name, field in model.model_fields.items():
        sections = list(sections_in(field.annotation))
        if not sections:
            yield above + name
        for section in sections:
            yield from settable(section, f"{above}{name}.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections that an annotation holds, also in a union or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


@pytest.mark.parametrize(
    "find",
    [
        find_long_lines,
        find_places_without_the_formatter,
        find_long_files,
        find_long_functions,
        find_many_parameters,
        find_crowded_comprehensions,
        find_chained_conditionals,
        find_two_of_one_name,
        find_tests_that_import_tests,
        find_more_cuda,
        find_more_settings,
    ],
    ids=lambda find: find.__name__.removeprefix("find_"),
)
def test_budget(find: Callable[[], Iterator[str]]) -> None:
    problems = list(find())
    assert not problems, "\n" + "\n".join(problems)
