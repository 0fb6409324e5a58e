"""How sequences are cut into micro-batches and laid out for a forward pass.

Completions of one prompt share its computation. A pack is a prompt with some of its completions behind it,
each of which sees the prompt and itself alone:

    prompt [5, 6], completions [7] and [8, 9]    ->    [5, 6, 7, 8, 9], where 8 does not see 7

A group of k completions then costs its prompt once instead of k times, and every number stays what it is
apart. On the way to a forward pass: `packs_of`, `split_ranks`, `micro_batches`, `pad`. Imports torch and
numpy alone.
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
"""[N], which of the sequences"""
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
        own = self.segments[:, :, None]
        other = self.segments[:, None, :]
        return ((other == 0) | (other == own)).tril()[:, None]

    def blocks(self) -> Any:
        """The same as a BlockMask of `torch.nn.attention.flex_attention`, [B, 1, L, L]. Needs `segments`."""
        from torch.nn.attention.flex_attention import create_block_mask

        segments = self.segments
        assert segments is not None

        def visible(pack: Tensor, head: Tensor, own: Tensor, other: Tensor) -> Tensor:
            segment = segments[pack, other]
            return (own >= other) & ((segment == 0) | (segment == segments[pack, own]))

        rows, length = segments.shape
        return create_block_mask(
            visible, rows, None, length, length, device=segments.device, _compile=segments.is_cuda
        )


def packs_of(sequences: Sequences, rows: Rows, *, budget_tokens: int, reach: float) -> list[Pack]:
    """Put neighbours with the same prompt into one pack of at most `budget_tokens`, as far as that saves
    work.

    A completion of T tokens joins a pack while T n <= reach P, where n is the number of completion tokens
    that the pack already holds, and P that of the prompt. The left side is the attention that is then
    computed and masked, the right side the prompt that is saved. `reach` comes from the model (`reach()` in
    `frpo.logprobs`); 0 keeps all sequences apart.

    Example: three times a prompt of 10 tokens with a completion of 100. The second completion adds
    100 * 100 masked pairs, the third 100 * 200:

        reach 999   -> [[0], [1], [2]]
        reach 1000  -> [[0, 1], [2]]
        reach 2000  -> [[0, 1, 2]]
    """
    starts = np.cumsum(sequences.lengths) - sequences.lengths
    packs: list[list[int]] = []
    pack_prompt: bytes | None = None
    pack_completions = 0  # tokens of them
    for row in rows:
        prompt_length = int(sequences.prompt_lengths[row])
        completion_length = int(sequences.lengths[row]) - prompt_length
        prompt = sequences.tokens[starts[row] : starts[row] + prompt_length].tobytes()
        fits = prompt_length + pack_completions + completion_length <= budget_tokens
        saves = reach > 0 and completion_length * pack_completions <= reach * prompt_length
        if prompt == pack_prompt and fits and saves:
            packs[-1].append(int(row))
            pack_completions += completion_length
        else:
            packs.append([int(row)])
            pack_prompt = prompt
            pack_completions = completion_length
    return [np.array(pack, dtype=np.int64) for pack in packs]


def pack_lengths(sequences: Sequences, packs: Sequence[Pack]) -> NDArray[np.int64]:
    """Tokens of each pack, the prompt counted once.

    Example: the prompt [5, 6] with the completions [7] and [8, 9] makes a pack of 2 + 1 + 2 = 5 tokens.
    """
    completions = _completion_lengths(sequences)
    lengths = [sequences.prompt_lengths[pack[0]] + completions[pack].sum() for pack in packs]
    return np.array(lengths, dtype=np.int64)


def cut_micro_batches(
    lengths: Sequence[int] | NDArray[Any], budget_tokens: int, *, stretch: float = math.inf
) -> list[Rows]:
    """Sort sequences by length and cut them into batches of at most `budget_tokens` tokens, padding
    included; a sequence longer than that is a batch of its own.

    A batch of ENOUGH_TOKENS, counted as padded to the next sequence, is closed before one that is more than
    `stretch` times as long as its shortest.

    Example: 20 sequences of 50 tokens and 20 of 100, under a budget of 100,000. All 40 are one batch; with
    stretch=1.15 the first 20, 1,000 tokens, are enough to stand alone, and two batches come back.
    """
    batches: list[list[int]] = []
    for row in np.argsort(np.asarray(lengths), kind="stable"):
        longest = int(lengths[row])  # ascending: the newest is the longest
        if batches and _may_join(batches[-1], int(lengths[batches[-1][0]]), longest, budget_tokens, stretch):
            batches[-1].append(int(row))
        else:
            batches.append([int(row)])
    return [np.array(batch, dtype=np.int64) for batch in batches]


def _may_join(batch: list[int], shortest: int, longest: int, budget_tokens: int, stretch: float) -> bool:
    """Whether a sequence of `longest` tokens, which all others are then padded to, joins a batch."""
    if (len(batch) + 1) * longest > budget_tokens:
        return False
    small = len(batch) * longest < ENOUGH_TOKENS
    return small or longest <= stretch * shortest


def split_ranks(lengths: Sequence[int] | NDArray[Any], world_size: int) -> list[Rows]:
    """Deal sequences to ranks, longest first and back and forth, so that all get about as many tokens.

    Example: the lengths [9, 8, 7, 6] go to two ranks as [0, 3] and [1, 2], 15 tokens each.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    turn = np.arange(len(order)) % (2 * world_size)
    owner = np.minimum(turn, 2 * world_size - 1 - turn)  # of two ranks: 0, 1, 1, 0, 0, 1, 1, 0, ...
    return [np.sort(order[owner == rank]) for rank in range(world_size)]


def pad_packs(sequences: Sequences, packs: Sequence[Pack], device: torch.device | str = "cpu") -> MicroBatch:
    """Lay the packs out as one batch, padded on the right with token 0, which no real token attends to.

    Example: the prompt [5, 6] with the completions [7] and [8, 9], and the prompt [4] with [3]:

        tokens     [[5, 6, 7, 8, 9],    positions  [[0, 1, 2, 2, 3],    segments  [[0, 0, 1,  2,  2],
                    [4, 3, 0, 0, 0]]                [0, 1, 0, 0, 0]]               [0, 1, -1, -1, -1]]
        targets    [7, 8, 9, 3]
        source     [1, 1, 3, 5]    7 and 8 are both predicted by the prompt's last token
        mask       [[True, False], [True, True], [True, False]]
    """
    prompt_lengths = sequences.prompt_lengths.astype(np.int64)
    completion_lengths = _completion_lengths(sequences)
    ends = np.cumsum(sequences.lengths)
    starts = ends - sequences.lengths
    width = int(pack_lengths(sequences, packs).max())
    tokens = np.zeros((len(packs), width), dtype=np.int64)
    positions = np.zeros((len(packs), width), dtype=np.int64)
    segments = np.full((len(packs), width), -1, dtype=np.int64)
    source = []
    targets = []
    for i, pack in enumerate(packs):
        prompt_length = int(prompt_lengths[pack[0]])
        prompt = slice(0, prompt_length)
        tokens[i, prompt] = sequences.tokens[starts[pack[0]] : starts[pack[0]] + prompt_length]
        positions[i, prompt] = np.arange(prompt_length)
        segments[i, prompt] = 0
        filled = prompt_length
        for segment, row in enumerate(pack, start=1):
            length = int(completion_lengths[row])
            completion = slice(filled, filled + length)
            filled += length
            tokens[i, completion] = sequences.tokens[ends[row] - length : ends[row]]
            positions[i, completion] = prompt_length + np.arange(length)
            segments[i, completion] = segment
            targets.append(tokens[i, completion])
            predictors = i * width + np.arange(completion.start, completion.stop) - 1
            predictors[:1] = i * width + prompt_length - 1
            source.append(predictors)
    counts = completion_lengths[np.concatenate(packs)]
    mask = np.arange(int(counts.max())) < counts[:, None]
    shared = len(counts) > len(packs)
    put = lambda a: torch.from_numpy(a).to(device)  # noqa: E731
    return MicroBatch(
        tokens=put(tokens),
        positions=put(positions) if shared else None,
        segments=put(segments) if shared else None,
        source=put(np.concatenate(source)),
        targets=put(np.concatenate(targets)),
        mask=put(mask),
    )


def pad_values(values: Floats, sequences: Sequences, rows: Rows, width: int) -> Tensor:
    """Per-token values `[sum of completion lengths]` of the chosen sequences as `[N, width]` float32, 0
    beyond each end.

    Example: the values [0.1, 0.2, 0.3] of completions of one and two tokens become [[0.1, 0], [0.2, 0.3]].
    """
    counts = _completion_lengths(sequences)
    ends = np.cumsum(counts)
    padded = np.zeros((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        padded[i, : counts[row]] = values[ends[row] - counts[row] : ends[row]]
    return torch.from_numpy(padded)


def _completion_lengths(sequences: Sequences) -> NDArray[np.int64]:
    """[N], tokens"""
    return (sequences.lengths - sequences.prompt_lengths).astype(np.int64)
