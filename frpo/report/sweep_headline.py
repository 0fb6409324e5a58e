"""The words of a sweep's headline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from frpo.records import Record
from frpo.report.comparisons import Comparison
from frpo.report.intervals import MIN_SEEDS
from frpo.report.schema import Decision


class SeedVerdict(Record):
    """What the page of one seed says of its policies."""

    seed: int
    decision: Decision
    arm: str
    policy: str
    """Its folder."""


def of_sweep(
    comparisons: Sequence[Comparison], *, finetunes: Sequence[str], focus: str, num_seeds: int, intervals: str
) -> Iterator[str]:
    """The answer first: at equal KL where there are curves, else arm by arm; then each pair, with its details
    for the first of `finetunes`, which are in order of how much they say. `intervals` says how they were
    made."""
    kept = [comparison for comparison in comparisons if comparison.metric.startswith("kept ")]
    rows = _matched_by("kl", kept) or _matched_by("steps", kept)
    if rows:
        yield _answer(rows)
        yield from _details_of_pairs(rows, _matched_by("beta", kept), finetunes[0], num_seeds)
    if num_seeds < MIN_SEEDS:
        yield (
            f"Seeds: {num_seeds}. From fewer than {MIN_SEEDS} nothing is said of others: no intervals, no "
            f"verdicts; what stands here is of these runs alone. Reward on {focus} prompts."
        )
        return
    chosen = f"; details after {finetunes[0]}, which left nearest to half" if len(finetunes) > 1 else ""
    yield (
        f"{num_seeds} seeds; reward on {focus} prompts{chosen}; 95 % intervals by {intervals}, arms "
        "paired by both; * where the corrected interval leaves 0 out."
    )


def of_verdicts(verdicts: Sequence[SeedVerdict]) -> Iterator[str]:
    """What the pages of the seeds say of their policies, as a person counts them."""
    by_decision: dict[Decision, list[str]] = {}
    for verdict in verdicts:
        by_decision.setdefault(verdict.decision, []).append(verdict.arm)
    counted = []
    for decision, arms in sorted(by_decision.items(), key=lambda item: -len(item[1])):
        named = ", ".join(f"{arm} {times}" for arm, times in Counter(arms).most_common())
        counted.append(f"{decision} in {len(arms)} ({named})")
    if counted:
        yield f"Of {len(verdicts)} seeds the page, by its rules, says: {'; '.join(counted)}."


def _matched_by(way: str, comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [comparison for comparison in comparisons if comparison.matched_by == way]


def _answer(rows: Sequence[Comparison]) -> str:
    where, told = "Whatever their KL to the reference", "two arms"
    if rows[0].matched_by == "kl":
        where, told = "At equal KL to the reference", "two methods"
    verdicts = _count_verdicts(rows)
    silent = len(rows) - verdicts.total()
    if not verdicts:
        return (
            f"{where}: {len(rows)} comparisons of kept reward, none over {MIN_SEEDS} seeds or more: nothing "
            "is shown."
        )
    words = (
        f"{where}, {verdicts[1] + verdicts[-1]} of {len(rows)} comparisons of kept reward tell {told} apart; "
        f"in {verdicts[0]} the interval, corrected for their number, contains 0"
    )
    return f"{words}, and {silent} are of fewer than {MIN_SEEDS} seeds." if silent else f"{words}."


def _count_verdicts(rows: Sequence[Comparison]) -> Counter[int]:
    return Counter(row.verdict for row in rows if row.corrected_lo is not None)


def _details_of_pairs(
    rows: Sequence[Comparison], at_equal_beta: Sequence[Comparison], finetune: str, num_seeds: int
) -> Iterator[str]:
    """How often each pair was told apart, and what was measured of it after one fine-tune."""
    metric = f"kept after {finetune}"
    for pair in dict.fromkeys((row.a, row.b) for row in rows):
        own = [row for row in rows if (row.a, row.b) == pair]
        verdicts = _count_verdicts(own)
        counted = f", more in {verdicts[1]} and less in {verdicts[-1]} of {len(own)}" if verdicts else ""
        words = "; ".join(_in_words(row, num_seeds) for row in own if row.metric == metric)
        after = f", after {finetune}: {words}" if words else ""
        yield f"{pair[0]} against {pair[1]}{counted}{after}."
        beside = [row for row in at_equal_beta if (row.a, row.b, row.metric) == (*pair, metric)]
        if beside:
            said = "; ".join(_in_words(row, num_seeds) for row in beside)
            yield f"The same at equal β, each at its own KL: {said}."


def _in_words(row: Comparison, num_seeds: int) -> str:
    at = {"kl": f"KL {row.at_kl or 0:.2f}", "beta": f"β {row.at_beta or 0:g},", "steps": "KL"}[row.matched_by]
    if row.kl_difference:
        at = f"{at} {row.kl_difference.mean:+.2f} nats away"
    if row.num_seeds < num_seeds:
        at = f"{at} ({row.num_seeds} seeds)"
    return f"{row.interval:+.3f} at {at}{'*' * abs(row.verdict)}"
