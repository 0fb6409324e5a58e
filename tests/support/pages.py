"""What tests read out of the pages of docs: sections, tables, and the code in their cells."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"(`+)(.+?)\1")


@dataclass(frozen=True)
class Table:
    section: str
    """The heading above it, without marks of code."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> list[str]:
        return [row[self.header.index(name)] for row in self.rows]


def read_tables(page: str) -> list[Table]:
    """Of a page in docs/, in order."""
    tables = list[Table]()
    for section in re.split(r"^#+ ", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            header, _, *rows = [cells_of(line) for line in block.splitlines()]
            assert {len(row) for row in rows} == {len(header)}, (title, header)
            tables.append(Table(title.strip("`"), header, tuple(rows)))
    return tables


def cells_of(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def code_in(cell: str) -> list[str]:
    """What stands in its marks of code."""
    return [text for _, text in CODE.findall(cell)]


def load_hook(name: str) -> ModuleType:
    """A file of docs/hooks, by which the site and parts of its pages are made."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
