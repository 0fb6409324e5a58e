"""How sequences are cut into micro-batches and laid out for a forward pass: completions of one prompt share
its computation.

A pack is a prompt with some of its completions behind it, each of which sees the prompt and itself alone. A
group of k completions costs its prompt once instead of k times, and every number stays what it is apart.
Imports torch and numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frpo.types import Floats, Sequences

Rows = NDArray[np.int64]
Pack = NDArray[np.int64]
"""Rows with the same prompt, in one row of a micro-batch."""

ENOUGH_TOKENS = 512
"""From here on a batch fills a core; a longer one gains less than its padding costs."""


@dataclass(frozen=True)
class MicroBatch:
    """B packs padded on the right, L the longest of them; N completions in the order of the packs, T the
    longest, M completion tokens."""

    tokens: Tensor
    """[B, L] int64"""
    positions: Tensor | None
    """[B, L] int64, each completion goes on from the end of its prompt; None where every pack is one
    sequence"""
    segments: Tensor | None
    """[B, L] int64, 0 in a prompt, i in its i-th completion, -1 in padding; None where every pack is one
    sequence"""
    source: Tensor
    """[M] int64, index into B * L of the position that predicts each completion token"""
    targets: Tensor
    """[M] int64, the completion tokens"""
    mask: Tensor
    """[N, T] bool, where the M tokens stand, row by row"""

    def visible(self) -> Tensor | None:
        """[B, 1, L, L] bool: whom each position may attend to; None for plain causal attention. Padding sees
        earlier padding."""
        if self.segments is None:
            return None
        own, other = self.segments[:, :, None], self.segments[:, None, :]
        return ((other == 0) | (other == own)).tril()[:, None]

    def blocks(self) -> Any:
        """The same as a BlockMask of `torch.nn.attention.flex_attention`, [B, 1, L, L]; packs alone have
        one."""
        from torch.nn.attention.flex_attention import create_block_mask

        segments = self.segments
        assert segments is not None

        def visible(b: Tensor, h: Tensor, own: Tensor, other: Tensor) -> Tensor:
            there = segments[b, other]
            return (own >= other) & ((there == 0) | (there == segments[b, own]))

        rows, length = segments.shape
        return create_block_mask(
            visible, rows, None, length, length, device=segments.device, _compile=segments.is_cuda
        )


def packs_of(sequences: Sequences, rows: Rows, *, budget_tokens: int, reach: float) -> list[Pack]:
    """Put neighbours with the same prompt into one pack of at most `budget_tokens`, as far as that saves
    work.

    A completion of T tokens joins while what it adds, attention to the n tokens of the completions before it
    that is computed and masked, costs less than the prompt of P tokens that it saves: T n <= reach P. `reach`
    is Scorer.reach(); 0 keeps all sequences apart.
    """
    starts = np.cumsum(sequences.lengths) - sequences.lengths
    packs: list[list[int]] = []
    last, behind = b"", 0
    for row in rows:
        size = int(sequences.prompt_lengths[row])
        length = int(sequences.lengths[row]) - size
        prompt = sequences.tokens[starts[row] : starts[row] + size].tobytes()
        if (
            reach
            and prompt == last
            and size + behind + length <= budget_tokens
            and length * behind <= reach * size
        ):
            packs[-1].append(int(row))
            behind += length
        else:
            packs.append([int(row)])
            last, behind = prompt, length
    return [np.array(p, dtype=np.int64) for p in packs]


def pack_lengths(sequences: Sequences, packs: Sequence[Pack]) -> NDArray[np.int64]:
    """Tokens of each pack, the prompt counted once."""
    completions = (sequences.lengths - sequences.prompt_lengths).astype(np.int64)
    return np.array([sequences.prompt_lengths[p[0]] + completions[p].sum() for p in packs], dtype=np.int64)


def micro_batches(
    lengths: Sequence[int] | NDArray[Any], budget_tokens: int, *, stretch: float = math.inf
) -> list[Rows]:
    """Cut sequences, sorted by length, into batches of at most `budget_tokens` padded tokens (at least one
    sequence).

    A batch that padding to the next sequence would bring to ENOUGH_TOKENS takes none that is more than
    `stretch` times as long as its shortest.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    batches: list[list[int]] = []
    for row in order:
        longest = int(lengths[row])  # ascending: the newest is the longest
        fits = bool(batches) and (len(batches[-1]) + 1) * longest <= budget_tokens
        if fits and (
            len(batches[-1]) * longest < ENOUGH_TOKENS or longest <= stretch * int(lengths[batches[-1][0]])
        ):
            batches[-1].append(int(row))
        else:
            batches.append([int(row)])
    return [np.array(b, dtype=np.int64) for b in batches]


def split_ranks(lengths: Sequence[int] | NDArray[Any], world_size: int) -> list[Rows]:
    """Deal sequences to ranks, longest first and back and forth, so that all get about as many tokens."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    turn = np.arange(len(order)) % (2 * world_size)
    owner = np.minimum(turn, 2 * world_size - 1 - turn)
    return [np.sort(order[owner == rank]) for rank in range(world_size)]


def pad(sequences: Sequences, packs: Sequence[Pack], device: torch.device | str = "cpu") -> MicroBatch:
    """The chosen packs as one padded batch (padding is token 0, and no real token attends to it)."""
    ends = np.cumsum(sequences.lengths)
    prompts = sequences.prompt_lengths.astype(np.int64)
    counts = sequences.lengths.astype(np.int64) - prompts
    width = int(pack_lengths(sequences, packs).max())
    tokens, positions = (
        np.zeros((len(packs), width), dtype=np.int64),
        np.zeros((len(packs), width), dtype=np.int64),
    )
    segments = np.full((len(packs), width), -1, dtype=np.int64)
    source = []
    for b, pack in enumerate(packs):
        at = int(prompts[pack[0]])
        start = ends[pack[0]] - sequences.lengths[pack[0]]
        tokens[b, :at], positions[b, :at], segments[b, :at] = (
            sequences.tokens[start : start + at],
            np.arange(at),
            0,
        )
        last = b * width + at - 1
        for i, row in enumerate(pack, start=1):
            here, n = slice(at, at + counts[row]), int(counts[row])
            tokens[b, here] = sequences.tokens[ends[row] - n : ends[row]]
            positions[b, here] = prompts[row] + np.arange(n)
            segments[b, here] = i
            source.append(np.concatenate([[last], b * width + at + np.arange(n - 1)])[:n])
            at += n
    rows = np.concatenate(packs)
    mask = np.arange(int(counts[rows].max()))[None] < counts[rows][:, None]
    targets = np.concatenate([sequences.tokens[ends[r] - counts[r] : ends[r]] for r in rows]).astype(np.int64)
    shared = len(rows) > len(packs)
    put = lambda a: torch.from_numpy(a).to(device)  # noqa: E731
    return MicroBatch(
        tokens=put(tokens),
        positions=put(positions) if shared else None,
        segments=put(segments) if shared else None,
        source=put(np.concatenate(source)),
        targets=put(targets),
        mask=put(mask),
    )


def pad_values(values: Floats, sequences: Sequences, rows: Rows, width: int) -> Tensor:
    """Per-token values `[sum of completion lengths]` of the chosen sequences as `[N, width]`, 0 beyond each
    end."""
    counts = (sequences.lengths - sequences.prompt_lengths).astype(np.int64)
    ends = np.cumsum(counts)
    out = np.zeros((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        out[i, : counts[row]] = values[ends[row] - counts[row] : ends[row]]
    return torch.from_numpy(out)
