"""The one place where a log-prob of a completion is computed, and how sequences are cut into micro-batches for it.

Imports torch and numpy alone; the model is any causal language model of transformers, plain or wrapped by peft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frpo.types import Floats, Sequences

Rows = NDArray[np.int64]

CHUNK_ELEMENTS = 1 << 24
"""Logits computed at once (positions x vocabulary): 64 MiB in float32."""


@dataclass(frozen=True)
class MicroBatch:
    """B sequences padded on the right, L the longest of them."""

    tokens: Tensor
    """[B, L] int64"""
    prompt_lengths: Tensor
    """[B] int64"""
    lengths: Tensor
    """[B] int64"""


ENOUGH_TOKENS = 512
"""From here on a batch fills a core; a longer one gains less than its padding costs."""


def micro_batches(lengths: Sequence[int] | NDArray[Any], budget_tokens: int, *, stretch: float = math.inf) -> list[Rows]:
    """Cut sequences, sorted by length, into batches of at most `budget_tokens` padded tokens (at least one sequence).

    A batch that padding to the next sequence would bring to ENOUGH_TOKENS takes none that is more than `stretch` times as long as its
    shortest.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    batches: list[list[int]] = []
    for row in order:
        longest = int(lengths[row])  # ascending: the newest is the longest
        fits = bool(batches) and (len(batches[-1]) + 1) * longest <= budget_tokens
        if fits and (len(batches[-1]) * longest < ENOUGH_TOKENS or longest <= stretch * int(lengths[batches[-1][0]])):
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


def pad(sequences: Sequences, rows: Rows, device: torch.device | str = "cpu") -> MicroBatch:
    """The chosen sequences as one padded batch (padding is token 0 and never attended to by a real token)."""
    ends = np.cumsum(sequences.lengths)
    lengths = sequences.lengths[rows].astype(np.int64)
    tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]] = sequences.tokens[ends[row] - lengths[i] : ends[row]]
    prompts = sequences.prompt_lengths[rows].astype(np.int64)
    return MicroBatch(*(torch.from_numpy(a).to(device) for a in (tokens, prompts, lengths)))


def pad_values(values: Floats, sequences: Sequences, rows: Rows, width: int) -> Tensor:
    """Per-token values `[sum of completion lengths]` of the chosen sequences as `[B, width]`, 0 beyond each end."""
    counts = (sequences.lengths - sequences.prompt_lengths).astype(np.int64)
    ends = np.cumsum(counts)
    out = np.zeros((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        out[i, : counts[row]] = values[ends[row] - counts[row] : ends[row]]
    return torch.from_numpy(out)


@dataclass(frozen=True)
class TokenLogprobs:
    """Completion tokens of B sequences, T the longest completion."""

    logprobs: Tensor
    """[B, T] float32, nats; 0 where not `mask`"""
    entropy: Tensor
    """[B, T] float32, nats, detached; 0 where not `mask`"""
    mask: Tensor
    """[B, T] bool"""


class Scorer(nn.Module):
    """A causal language model whose forward pass gives completion log-probs instead of logits.

    Logits exist only at completion positions and only in chunks, so a large vocabulary does not fill the memory. The head
    is called as a module: ZeRO-3 gathers its weights by a hook.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = self.causal().config
        for name in ("final_logit_softcapping", "logit_scale"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"model {config.model_type}: it reshapes its logits by {name}, which is not supported")

    def causal(self) -> Any:
        """The transformers model inside a peft wrapper."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(self, batch: MicroBatch, temperature: float = 1.0) -> TokenLogprobs:
        causal = self.causal()
        # padding stands on the right, where causal attention never looks: no attention mask is needed
        hidden = getattr(causal, causal.base_model_prefix)(input_ids=batch.tokens, use_cache=False).last_hidden_state
        width = int((batch.lengths - batch.prompt_lengths).max())
        offset = torch.arange(width, device=batch.tokens.device)[None]
        mask = offset < (batch.lengths - batch.prompt_lengths)[:, None]
        target_at = (batch.prompt_lengths[:, None] + offset).clamp(max=batch.tokens.shape[1] - 1)
        rows, columns = mask.nonzero(as_tuple=True)
        positions = target_at[rows, columns]
        states, targets = hidden[rows, positions - 1], batch.tokens[rows, positions]
        values, entropies = self._chunked(causal.get_output_embeddings(), states, targets, temperature)
        empty = torch.zeros(mask.shape, device=values.device)
        return TokenLogprobs(empty.index_put((rows, columns), values), empty.index_put((rows, columns), entropies), mask)

    @staticmethod
    def _chunked(head: nn.Module, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        def one(state: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(state).float() / temperature
            logp = torch.log_softmax(logits, dim=-1)
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
            return logp.gather(1, target[:, None]).squeeze(1), entropy

        size = max(256, CHUNK_ELEMENTS // int(getattr(head, "out_features", 1 << 16)))
        chunks = list(zip(states.split(size), targets.split(size), strict=True))
        again = torch.is_grad_enabled() and len(chunks) > 1  # one chunk is small enough to keep its logits
        done = [checkpoint(one, s, t, use_reentrant=False) if again else one(s, t) for s, t in chunks]
        return torch.cat([d[0] for d in done]), torch.cat([d[1] for d in done])


@torch.no_grad()
def completion_logprobs(
    scorer: Any, sequences: Sequences, *, temperature: float, budget_tokens: int, device: torch.device | str = "cpu"
) -> Floats:
    """Log-probs of all completion tokens, `[sum of completion lengths]` in the order of the sequences.

    `scorer` is a Scorer, or an engine around one.
    """
    counts = (sequences.lengths - sequences.prompt_lengths).astype(np.int64)
    starts = np.cumsum(counts) - counts
    out = np.zeros(int(counts.sum()), dtype=np.float32)
    for rows in micro_batches(sequences.lengths, budget_tokens):
        found = scorer(pad(sequences, rows, device), temperature).logprobs.cpu().numpy()
        for i, row in enumerate(rows):
            out[starts[row] : starts[row] + counts[row]] = found[i, : counts[row]]
    return out
