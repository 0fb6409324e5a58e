"""The words of a sweep's headline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from frpo.report.comparisons import Comparison
from frpo.report.intervals import MIN_SEEDS


def of_sweep(
    comparisons: Sequence[Comparison], *, harshest: str, focus: str, num_seeds: int, intervals: str
) -> Iterator[str]:
    """The answer first: at equal KL where there are curves, else arm by arm; details for the fine-tune that
    cost most, `harshest`. `intervals` says how they were made."""
    kept = [comparison for comparison in comparisons if comparison.metric.startswith("kept ")]
    rows = _matched_by("kl", kept) or _matched_by("steps", kept)
    if rows:
        yield f"{_say_against(rows)}: {_count_verdicts(rows)}"
        metric = f"kept after {harshest}"
        yield from _details_of_pairs(
            [row for row in rows if row.metric == metric],
            [row for row in _matched_by("beta", kept) if row.metric == metric],
            harshest,
            several=len({row.b for row in rows}) > 1,
            num_seeds=num_seeds,
        )
    if num_seeds < MIN_SEEDS:
        yield (
            f"Seeds: {num_seeds}. From fewer than {MIN_SEEDS} nothing is said of others: no intervals, no "
            f"verdicts; what stands here is of these runs alone. Reward on {focus} prompts."
        )
        return
    yield (
        f"{num_seeds} seeds; reward on {focus} prompts; 95 % intervals by {intervals}, arms "
        "paired by both; * where the corrected interval leaves 0 out."
    )


def _matched_by(way: str, comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [comparison for comparison in comparisons if comparison.matched_by == way]


def _say_against(rows: Sequence[Comparison]) -> str:
    where = "whatever their KL to the reference"
    if rows[0].matched_by == "kl":
        where = "at equal KL to the reference"
    rivals = " and ".join(dict.fromkeys(row.b for row in rows))
    return f"Against {rivals}, {where}"


def _count_verdicts(rows: Sequence[Comparison]) -> str:
    verdicts = Counter(row.verdict for row in rows if row.corrected_lo is not None)
    silent = len(rows) - verdicts.total()
    if not verdicts:
        return (
            f"{len(rows)} comparisons of kept reward, none over {MIN_SEEDS} seeds or more: nothing is shown."
        )
    words = (
        f"of {len(rows)} comparisons of kept reward, {verdicts[1]} show more and {verdicts[-1]} less; in "
        f"{verdicts[0]} the interval, corrected for their number, contains 0"
    )
    return f"{words}, and {silent} are of fewer than {MIN_SEEDS} seeds." if silent else f"{words}."


def _details_of_pairs(
    rows: Sequence[Comparison],
    at_equal_beta: Sequence[Comparison],
    finetune: str,
    *,
    several: bool,
    num_seeds: int,
) -> Iterator[str]:
    """What was measured of each pair after one fine-tune; the rival is named where there are several."""
    for a, b in dict.fromkeys((row.a, row.b) for row in rows):
        against = f" against {b}" if several else ""
        words = "; ".join(_in_words(row, num_seeds) for row in rows if row.a == a)
        yield f"{a}{against}, after {finetune}: {words}."
        beside = "; ".join(_in_words(row, num_seeds) for row in at_equal_beta if (row.a, row.b) == (a, b))
        if beside:
            yield f"The same at equal β, each at its own KL: {beside}."


def _in_words(row: Comparison, num_seeds: int) -> str:
    at = {"kl": f"KL {row.at_kl or 0:.2f}", "beta": f"β {row.at_beta or 0:g},", "steps": "KL"}[row.matched_by]
    if row.kl_difference:
        at = f"{at} {row.kl_difference.mean:+.2f} nats away"
    if row.num_seeds < num_seeds:
        at = f"{at} ({row.num_seeds} seeds)"
    return f"{row.interval:+.3f} at {at}{'*' * abs(row.verdict)}"
