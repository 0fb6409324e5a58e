"""Groups that are scored together: as sequences, and their values by group again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from frpo.batching import flatten
from frpo.types import Completion, Floats, Group, Sequences

Logprobs = tuple[Floats, ...]
"""k arrays [T] of a group, nats."""
Block = list[Group]
"""Groups that are scored together; see `batching.blocks_of`."""


def sequences_of(block: Sequence[Group]) -> Sequences:
    return flatten(
        [(group.prompt.token_ids, completion.token_ids) for group, completion in _completions_of(block)]
    )


def by_group(flat: Floats, block: Sequence[Group]) -> list[Logprobs]:
    """Values of all completion tokens of a block, `[sum of completion lengths]`, as k arrays [T] per
    group."""
    ends = np.cumsum([len(completion.token_ids) for _, completion in _completions_of(block)])
    parts = iter(np.split(flat, ends[:-1]))
    rows = []
    for group in block:
        rows.append(tuple(next(parts) for _ in group.completions))
    return rows


def _completions_of(block: Sequence[Group]) -> Iterator[tuple[Group, Completion]]:
    """Every completion with its group, in order."""
    for group in block:
        for completion in group.completions:
            yield group, completion
