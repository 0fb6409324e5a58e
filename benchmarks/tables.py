"""Every number of the sweeps in docs/results with its interval, as tables.

    python benchmarks/tables.py docs/results

Writes tables.md from the JSON files of all studies that have arms.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from frpo.report import page
from frpo.report.bootstrap import Interval

Found = dict[str, Any]
"""An arm or a comparison as it was kept: older studies lack the newer fields."""
Row = dict[str, str]
"""Cells by title."""


def level(found: Found | None) -> str:
    return page.format_level(Interval(**found)) if found else ""


def arm_row(arm: Found) -> Row:
    """A fine-tune has a column for each thing that is measured after it."""
    row = {"arm": arm["arm"], "settings": arm["settings"], "steps": str(arm["num_steps"])}
    row |= {"KL to the reference": level(arm["kl"]), "before": level(arm["before"])}
    row |= {f"kept, {finetune}": level(v) for finetune, v in arm["kept"].items()}
    row |= {"other tasks before": level(arm["others"])}
    row |= {
        f"{title}, {finetune}": level(v)
        for title, key in (("other tasks", "others_kept"), ("score", "score"))
        for finetune, v in arm[key].items()
    }
    row |= {"certified at 0.5 nats": level(arm["certified"])}
    if covered := arm.get("coverage"):
        inside, fine_tunes = covered["inside"], covered["fine_tunes"]
        row |= {
            "inside its radius": "" if inside is None else f"{inside} of {fine_tunes}",
            "below the certificate": f"{covered['below']} of {fine_tunes + covered['attacks']}",
            "fine-tunes above it by": level(covered["above_certified"]),
            "attacks above it by": level(covered["attack_above_certified"]),
        }
    return row


def comparison_row(c: Found) -> Row:
    match c["matched_by"]:
        case "kl":
            at = f"KL {c['at_kl']:.2f}"
        case "beta":
            at = f"β {c['at_beta']:g}"
        case _:
            at = "steps"
    away = c["kl_difference"]
    return {
        "compared": f"{c['a']} − {c['b']}",
        "metric": c["metric"],
        "at equal": f"{at}, {away['mean']:+.2f} nats away" if away else at,
        "difference": page.format_difference(Interval(mean=c["difference"], lo=c["lo"], hi=c["hi"])),
        "corrected": f"[{c['corrected_lo']:+.3f}, {c['corrected_hi']:+.3f}]",
    }


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown; columns that are empty in every row are left out."""
    titles = [t for t in dict.fromkeys(t for r in rows for t in r) if any(r.get(t) for r in rows)]
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    yield from (f"| {' | '.join(r.get(t, '') for t in titles)} |" for r in rows)
    yield ""


def tables(folder: Path) -> str:
    words = [
        "# Tables",
        "",
        "Made by `python benchmarks/tables.py docs/results` from the JSON files beside it. Means over seeds "
        "with 95 % bootstrap intervals over seeds and prompts; corrected: for",
        "all comparisons of their kind of metric at once. What they mean stands in README.md.",
        "",
    ]
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        if "arms" not in found:
            continue
        words += [f"## {found['study']}, {len(found['seeds'])} seeds", ""]
        for setting in dict.fromkeys(a.get("setting") for a in found["arms"]):
            arms = [a for a in found["arms"] if a.get("setting") == setting]
            compared = [c for c in found["comparisons"] if c.get("setting") == setting]
            words += [f"### {compared[0]['label']}", ""] if setting else []
            words += [*table([arm_row(a) for a in arms]), *table([comparison_row(c) for c in compared])]
    return "\n".join(words)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "tables.md").write_text(tables(out))
