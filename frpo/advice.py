"""What a person should be told about a run's steps: numbers that mean that it learns little, and what to
change. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from frpo.stats import StepMetrics

PATIENCE = 3
"""Steps in a row without a reward that tells completions apart."""
MOST_CUT = 0.5
"""Share of cut completions above which a step is spoken of."""


def causes_of(recent: Sequence[StepMetrics], max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """(cause, what was seen, what it means and what to change, in one line) of the last of some steps."""
    step = recent[-1].step
    batch = recent[-1].batch
    if len(recent) >= PATIENCE and all(row.batch.equal_groups == 1 for row in recent[-PATIENCE:]):
        yield (
            "equal rewards",
            f"step {step}: all {batch.num_prompts - batch.dropped_groups} groups had equal rewards for "
            f"{PATIENCE} steps: no gradient comes from them; use harder or easier prompts, a finer reward, "
            "or more completions per group (rollout.group_size)",
        )
    if batch.cut_share > MOST_CUT:
        yield (
            "cut completions",
            f"step {step}: {batch.cut_share:.0%} of the completions are cut at rollout.max_new_tokens = "
            f"{max_new_tokens}: rewards judge unfinished answers; raise it, give rollout.stop, or set "
            "objective.cut to mask or penalise",
        )


class Adviser:
    """Watches the steps of one stage, in order."""

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.recent: list[StepMetrics] = []
        self.told: set[str] = set()

    def see(self, row: StepMetrics) -> list[str]:
        """What this step gives occasion to say for the first time in its stage."""
        self.recent = [*self.recent, row][-PATIENCE:]
        causes = dict(causes_of(self.recent, self.max_new_tokens))
        new = [text for cause, text in causes.items() if cause not in self.told]
        self.told |= set(causes)
        return new


def advise(rows: Iterable[StepMetrics], max_new_tokens: int) -> list[str]:
    """All that the steps of one stage give occasion to say, a line per cause."""
    adviser = Adviser(max_new_tokens)
    return list(itertools.chain.from_iterable(adviser.see(row) for row in rows))
