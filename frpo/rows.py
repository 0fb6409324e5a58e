"""metrics.jsonl and samples.jsonl: one JSON object a line, with the stage that wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from frpo.disk import write_text
from frpo.records import to_lines

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


def read_rows(folder: Path, name: str = METRICS) -> Iterator[dict[str, Any]]:
    """Rows of a file; a last line torn by a crash is left out, and a file that is not there has none."""
    path = folder / name
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def write_rows(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file in one step; one that is not there is not made for no rows."""
    text = to_lines(rows)
    if text or (folder / name).exists():
        write_text(folder / name, text)


def append_rows(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    if text := to_lines(rows):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)
