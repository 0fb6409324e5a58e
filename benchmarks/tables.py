"""Every number of the studies in docs/results with its interval, as tables.

    python benchmarks/tables.py docs/results

Writes tables.md from the studies' JSON files alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STUDIES = (
    "testbed_k3", "testbed_k3_beta",
    "testbed_k3_more", "testbed_reverse", "testbed_reverse_more", "testbed_penalties", "testbed_attack", "testbed_map", "smollm2_kl",
)  # fmt: skip


def level(found: Row | None) -> str:
    return f"{found['mean']:.2f} [{found['lo']:.2f}, {found['hi']:.2f}]" if found else ""


def gap(mean: float, lo: float, hi: float) -> str:
    return f"{mean:+.3f} [{lo:+.3f}, {hi:+.3f}]"


def columns(arms: Sequence[Row]) -> Iterator[tuple[str, Callable[[Row], str]]]:
    """Title and cell of every column; a fine-tune has one per thing measured after it."""
    yield "arm", lambda a: a["arm"]
    yield "settings", lambda a: a["settings"]
    yield "steps", lambda a: str(a["num_steps"])
    yield "KL to the reference", lambda a: level(a["kl"])
    yield "before", lambda a: level(a["before"])
    for finetune in arms[0]["kept"]:
        yield f"kept, {finetune}", lambda a, f=finetune: level(a["kept"][f])  # type: ignore[misc]
    yield "other tasks before", lambda a: level(a["others"])
    for title, key in (("other tasks", "others_kept"), ("score", "score")):
        for finetune in arms[0][key]:
            yield f"{title}, {finetune}", lambda a, k=key, f=finetune: level(a[k][f])  # type: ignore[misc]
    yield "certified at 0.5 nats", lambda a: level(a["certified"])
    yield (
        "inside its radius",
        lambda a: f"{c['inside']} of {c['fine_tunes']}" if (c := a.get("coverage")) and c["inside"] is not None else "",
    )
    yield "below the certificate", lambda a: f"{c['below']} of {c['fine_tunes'] + c['attacks']}" if (c := a.get("coverage")) else ""
    yield "fine-tunes above it by", lambda a: level((a.get("coverage") or {}).get("above_certified"))
    yield "attacks above it by", lambda a: level((a.get("coverage") or {}).get("attack_above_certified"))


def where(comparison: Row) -> str:
    away = comparison["kl_difference"]
    at = {"kl": f"KL {comparison['at_kl'] or 0:.2f}", "beta": f"β {comparison.get('at_beta') or 0:g}", "steps": "steps"}[
        comparison["matched_by"]
    ]
    return f"{at}, {away['mean']:+.2f} nats away" if away else at


COMPARED: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("compared", lambda c: f"{c['a']} − {c['b']}"),
    ("metric", lambda c: c["metric"]),
    ("at equal", where),
    ("difference", lambda c: gap(c["difference"], c["lo"], c["hi"])),
    ("corrected", lambda c: f"[{c['corrected_lo']:+.3f}, {c['corrected_hi']:+.3f}]"),
)


def table(rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]]) -> Iterator[str]:
    """Markdown; columns that are empty in every row are left out."""
    cells = [(title, [cell(r) for r in rows]) for title, cell in columns]
    shown = [(title, found) for title, found in cells if any(found)]
    yield "| " + " | ".join(title for title, _ in shown) + " |"
    yield "|" + " --- |" * len(shown)
    for line in zip(*(found for _, found in shown), strict=True):
        yield "| " + " | ".join(line) + " |"
    yield ""


def tables(folder: Path) -> str:
    words = [
        "# Tables",
        "",
        "Made by `python benchmarks/tables.py docs/results` from the JSON files beside it. Means over seeds with 95 % bootstrap intervals over seeds and prompts; corrected: for",
        "all comparisons of their kind of metric at once. What they mean stands in README.md.",
        "",
    ]
    for study in STUDIES:
        found = json.loads((folder / f"{study}.json").read_text())
        words += [f"## {study}, {len(found['seeds'])} seeds", ""]
        for setting in dict.fromkeys(a.get("setting") for a in found["arms"]):
            arms = [a for a in found["arms"] if a.get("setting") == setting]
            compared = [c for c in found["comparisons"] if c.get("setting") == setting]
            words += [f"### {compared[0]['label']}", ""] if setting else []
            words += [*table(arms, list(columns(arms))), *table(compared, COMPARED)]
    return "\n".join(words)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "tables.md").write_text(tables(out))
