"""What `make mutants` changes, and that the tests which it runs reach it."""

from __future__ import annotations

import ast
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
MODULES: list[str] = SETTINGS["only_mutate"]
TESTS: list[str] = SETTINGS["pytest_add_cli_args_test_selection"]


def names_in(node: ast.AST) -> set[str]:
    inside = list(ast.walk(node))
    names = {each.id for each in inside if isinstance(each, ast.Name)}
    return names | {each.attr for each in inside if isinstance(each, ast.Attribute)}


def defined_in(file: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    body = ast.parse((ROOT / file).read_text()).body
    return {each.name: each for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef)}


def reached_by(tests: list[str]) -> set[str]:
    """Names in the tests, and in what those name of the modules, and so on."""
    bodies = dict(chain.from_iterable(defined_in(module).items() for module in MODULES))
    waiting = set().union(*(names_in(ast.parse((ROOT / test).read_text())) for test in tests))
    reached = set[str]()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        if name in bodies:
            waiting |= names_in(bodies[name]) - reached
    return reached


def test_every_public_function_is_reached_by_the_selected_tests() -> None:
    reached = reached_by(TESTS)
    for module in MODULES:
        public = {name for name in defined_in(module) if not name.startswith("_")}
        assert public, module
        assert public <= reached, (module, public - reached)
