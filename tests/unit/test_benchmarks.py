"""Benchmarks run rarely; what they import of ours must be there all the same."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


def imports_of(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of ours, at the top or in a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("frpo", "actors"):
            for alias in node.names:
                yield node.module or "", alias.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "benchmarks")))
def test_what_a_benchmark_imports_of_ours_is_there(file: Path) -> None:
    missing = []
    for module, name in imports_of(file):
        if not hasattr(importlib.import_module(module), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ImportError:
                missing.append(f"{module}.{name}")
    assert missing == []
