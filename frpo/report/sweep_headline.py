"""The words of a sweep's headline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from frpo.report.bootstrap import Table
from frpo.report.comparisons import Comparison, kept_after


def of_sweep(table: Table, comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The answer first: at equal KL where there are curves, else arm by arm; details for the fine-tune that
    cost most."""
    kept = [comparison for comparison in comparisons if comparison.metric.startswith("kept ")]
    rows = _matched_by("kl", kept) or _matched_by("steps", kept)
    if rows:
        yield _count_verdicts(rows)
        harshest = min(
            table.finetunes, key=lambda name: float(table.of(kept_after(name, table.focus)).mean())
        )
        metric = f"kept after {harshest}"
        yield from _details_of_pairs(
            [row for row in rows if row.metric == metric],
            [row for row in _matched_by("beta", kept) if row.metric == metric],
            harshest,
            several=len({row.b for row in rows}) > 1,
        )
    yield (
        f"{len(table.reports)} seeds; reward on {table.focus} prompts; 95 % intervals by bootstrap over "
        "seeds and prompts, arms paired by both; * where the corrected interval leaves 0 out."
    )
    if len(table.reports) == 1:
        yield "This is one seed, and one seed proves nothing: these intervals are over prompts alone."


def _matched_by(way: str, comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [comparison for comparison in comparisons if comparison.matched_by == way]


def _count_verdicts(rows: Sequence[Comparison]) -> str:
    where = "whatever their KL to the reference"
    if rows[0].matched_by == "kl":
        where = "at equal KL to the reference"
    rivals = " and ".join(dict.fromkeys(row.b for row in rows))
    verdicts = Counter(row.verdict for row in rows)
    return (
        f"Against {rivals}, {where}: of {len(rows)} comparisons of kept reward, {verdicts[1]} show more and "
        f"{verdicts[-1]} less; in {verdicts[0]} the interval, corrected for their number, contains 0."
    )


def _details_of_pairs(
    rows: Sequence[Comparison], at_equal_beta: Sequence[Comparison], finetune: str, *, several: bool
) -> Iterator[str]:
    """What was measured of each pair after one fine-tune; the rival is named where there are several."""
    for a, b in dict.fromkeys((row.a, row.b) for row in rows):
        against = f" against {b}" if several else ""
        words = "; ".join(_in_words(row) for row in rows if row.a == a)
        yield f"{a}{against}, after {finetune}: {words}."
        beside = "; ".join(_in_words(row) for row in at_equal_beta if (row.a, row.b) == (a, b))
        if beside:
            yield f"The same at equal β, each at its own KL: {beside}."


def _in_words(row: Comparison) -> str:
    at = {"kl": f"KL {row.at_kl or 0:.2f}", "beta": f"β {row.at_beta or 0:g},", "steps": "KL"}[row.matched_by]
    away = f" {row.kl_difference.mean:+.2f} nats away" if row.kl_difference else ""
    return f"{row.difference:+.3f} [{row.lo:+.3f}, {row.hi:+.3f}] at {at}{away}{'*' * abs(row.verdict)}"
