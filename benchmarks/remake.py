"""Intervals of studies that were published with a percentile bootstrap, made again from its bounds.

    python benchmarks/remake.py docs/results

The runs are gone, and with them the numbers of each seed; the bounds still tell the standard error. Changes
the JSON files of the studies, the sentences of their headlines too; a study that names its intervals is left
alone. Their coverage stands in docs/results/intervals.json as `remade`.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from frpo.records import Z95
from frpo.report.comparisons import NUM_KLS, Comparison
from frpo.report.intervals import MIN_SEEDS, Interval
from frpo.report.student import CONFIDENCE, t_of
from frpo.report.sweep_headline import of_sweep

REMADE = "Student's t over seeds, from the bounds of a percentile bootstrap over seeds and prompts"

Kept = dict[str, Any]
"""A study, an arm, a comparison or an interval as it was kept: older studies lack the newer fields."""


def remake_interval(kept: Interval, seeds: int, confidence: float = CONFIDENCE) -> Interval:
    """Of the 95 % bounds of a percentile bootstrap, that of `interval_of`: none below MIN_SEEDS.

    The bounds are 2 * 1.96 standard errors apart, whose square is too small by (seeds - 1) / seeds: a sample
    that is drawn again has the variance of the sample, not of what it was drawn from.
    """
    if kept.lo is None or kept.hi is None or seeds < MIN_SEEDS:
        return Interval(mean=kept.mean, lo=None, hi=None)
    error = (kept.hi - kept.lo) / (2 * Z95) * math.sqrt(seeds / (seeds - 1))
    half = t_of(seeds - 1, confidence) * error
    return Interval(mean=kept.mean, lo=kept.mean - half, hi=kept.mean + half)


def remake_level(kept: Kept, seeds: int) -> Kept:
    return remake_interval(Interval(**kept), seeds).model_dump()


def find_levels(item: Any) -> Iterator[tuple[Kept, str]]:
    """Every mean with bounds inside, and where it is held: (holder, name)."""
    inside = item.items() if isinstance(item, dict) else []
    if isinstance(item, list):
        inside = [(str(i), each) for i, each in enumerate(item)]
    for name, each in inside:
        if isinstance(each, dict) and set(each) == {"mean", "lo", "hi"}:
            yield item, name
        else:
            yield from find_levels(each)


def remake_comparison(row: Kept, seeds: int, compared: int) -> None:
    """`compared`: how many are corrected together."""
    kept = Interval(mean=row["difference"], lo=row["lo"], hi=row["hi"])
    sure = remake_interval(kept, seeds)
    corrected = remake_interval(kept, seeds, 1 - (1 - CONFIDENCE) / compared)
    row |= {"lo": sure.lo, "hi": sure.hi, "corrected_lo": corrected.lo, "corrected_hi": corrected.hi}


def remake_study(study: Kept) -> None:
    """In place."""
    seeds = len(study["seeds"])
    for holder, name in [*find_levels(study["arms"]), *find_levels(study["comparisons"])]:
        holder[name] = remake_level(holder[name], seeds)
    sizes = Counter(kind_of(row) for row in study["comparisons"])
    for row in study["comparisons"]:
        remake_comparison(row, seeds, sizes[kind_of(row)] * kls_left_out(row))
    study["intervals"] = REMADE
    if "headline" in study:
        study["headline"] = list(say_headline(study))


def kind_of(row: Kept) -> tuple[str, ...]:
    """Rows of one kind were corrected together."""
    return row.get("setting", ""), row["matched_by"], row["metric"].partition(" after ")[0]


def kls_left_out(row: Kept) -> int:
    """How many KLs each kept one stands for: the map keeps the middle one of those that were compared."""
    return NUM_KLS if row.get("setting") == "short" else 1


def say_headline(study: Kept) -> Iterator[str]:
    rows = [Comparison(**{"at_beta": None, **row}) for row in study["comparisons"]]
    finetunes = study["arms"][0]["kept"]
    harshest = min(finetunes, key=lambda name: mean(arm["kept"][name]["mean"] for arm in study["arms"]))
    return of_sweep(
        rows, finetunes=[harshest], focus=study["focus"], num_seeds=len(study["seeds"]), intervals=REMADE
    )


def main() -> None:
    for file in sorted(Path(sys.argv[1]).glob("*.json")):
        text = file.read_text()
        study = json.loads(text)
        if "arms" in study and "intervals" not in study:
            remake_study(study)
            file.write_text(json.dumps(study, indent=1, ensure_ascii=text.isascii()) + "\n")


if __name__ == "__main__":
    main()
