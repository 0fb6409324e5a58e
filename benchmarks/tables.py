"""Every number of the sweeps in docs/results with its interval, as tables.

    python benchmarks/tables.py docs/results

Writes tables.md from the JSON files of all studies that have arms.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from frpo.report import page
from frpo.report.intervals import MIN_SEEDS, Interval

Kept = dict[str, Any]
"""A study, an arm or a comparison as it was kept: older studies lack the newer fields."""
Row = dict[str, str]
"""Cells by title."""


def format_level(interval: Kept | None) -> str:
    return page.format_level(Interval(**interval)) if interval else ""


def arm_row(arm: Kept) -> Row:
    """A fine-tune has a column for each thing that is measured after it."""
    row = {"arm": arm["arm"], "settings": arm["settings"], "steps": str(arm["num_steps"])}
    row |= {"KL to the reference": format_level(arm["kl"]), "before": format_level(arm["before"])}
    row |= _after_each("kept", arm["kept"])
    row |= {"other tasks before": format_level(arm["others"])}
    row |= _after_each("other tasks", arm["others_kept"])
    row |= _after_each("score", arm["score"])
    row |= {"certified at 0.5 nats": format_level(arm["certified"])}
    covered = arm.get("coverage")
    if covered:
        inside = covered["inside"]
        fine_tunes = covered["fine_tunes"]
        row |= {
            "inside its radius": "" if inside is None else f"{inside} of {fine_tunes}",
            "below the certificate": f"{covered['below']} of {fine_tunes + covered['attacks']}",
            "fine-tunes above it by": format_level(covered["above_certified"]),
            "attacks above it by": format_level(covered["attack_above_certified"]),
        }
    return row


def _after_each(title: str, levels: dict[str, Kept | None]) -> Row:
    return {f"{title}, {finetune}": format_level(level) for finetune, level in levels.items()}


def comparison_row(comparison: Kept) -> Row:
    match comparison["matched_by"]:
        case "kl":
            at = f"KL {comparison['at_kl']:.2f}"
        case "beta":
            at = f"β {comparison['at_beta']:g}"
        case _:
            at = "steps"
    away = comparison["kl_difference"]
    if away:
        at = f"{at}, {away['mean']:+.2f} nats away"
    difference = Interval(mean=comparison["difference"], lo=comparison["lo"], hi=comparison["hi"])
    return {
        "compared": f"{comparison['a']} − {comparison['b']}",
        "metric": comparison["metric"],
        "at equal": at,
        "difference": page.format_difference(difference),
        "corrected": format_limits(comparison["corrected_lo"], comparison["corrected_hi"]),
    }


def format_limits(lo: float | None, hi: float | None) -> str:
    return "" if lo is None or hi is None else f"[{lo:+.3f}, {hi:+.3f}]"


def write_table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown; columns that are empty in every row are left out."""
    filled: set[str] = set()
    for row in rows:
        filled.update(title for title, cell in row.items() if cell)
    titles = [title for title in dict.fromkeys(itertools.chain.from_iterable(rows)) if title in filled]
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        cells = " | ".join(row.get(title, "") for title in titles)
        yield f"| {cells} |"
    yield ""


def write_tables(folder: Path) -> str:
    lines = [
        "# Tables",
        "",
        "Made by `python benchmarks/tables.py docs/results` from the JSON files beside it. Means over seeds, "
        "with 95 % intervals from 5 seeds on; corrected: for all",
        "comparisons of their kind of metric at once. How the intervals were made stands with each study, "
        "what they mean in README.md.",
        "",
    ]
    for file in sorted(folder.glob("*.json")):
        study = json.loads(file.read_text())
        if "arms" in study:
            lines += [f"## {study['study']}, {len(study['seeds'])} seeds", ""]
            lines += [say_intervals(study), ""]
            lines += _tables_of(study)
    return "\n".join(lines)


def say_intervals(study: Kept) -> str:
    if len(study["seeds"]) < MIN_SEEDS:
        return f"No intervals: they take {MIN_SEEDS} seeds."
    return f"Intervals by {study['intervals']}."


def _tables_of(study: Kept) -> Iterator[str]:
    """Two a setting; studies of one setting do not name it."""
    for setting in dict.fromkeys(arm.get("setting") for arm in study["arms"]):
        arms = [arm for arm in study["arms"] if arm.get("setting") == setting]
        compared = [comparison for comparison in study["comparisons"] if comparison.get("setting") == setting]
        if setting:
            yield f"### {compared[0]['label']}"
            yield ""
        yield from write_table([arm_row(arm) for arm in arms])
        yield from write_table([comparison_row(comparison) for comparison in compared])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "tables.md").write_text(write_tables(out))
