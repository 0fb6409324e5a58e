"""The one place where a log-prob of a completion is computed.

Imports torch and numpy, no model library; the model is any causal language model of transformers, plain or
wrapped by peft.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frpo.config import ConfigError
from frpo.packing import MicroBatch, Pack, cut_micro_batches, pack_lengths, packs_of, pad_packs
from frpo.shape import CHUNK_ELEMENTS, CHUNK_POSITIONS
from frpo.types import Floats, Sequences

EVERYTHING = 1 << 40
"""A reach that puts all completions of a prompt into one pack."""
CHECKED = 4
"""Tokens whose logits are compared with the model's own when it is loaded."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Tokens of N completions, T the longest of them."""

    logprobs: Tensor
    """[N, T] float32, nats; 0 where not `mask`"""
    entropy: Tensor
    """[N, T] float32, nats, detached; 0 where not `mask`"""
    mask: Tensor
    """[N, T] bool"""


class ChunkedHead(nn.Module):
    """The output head of a model, by the weights that it has there, with log-probs in place of logits. These
    exist in chunks alone.

    One module computes all chunks: ZeRO-3 gathers a module's own weights whenever it is called
    (`fetch_sub_module` in deepspeed/runtime/zero/partitioned_param_coordinator.py), and ranks with different
    numbers of chunks would wait for each other for ever.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs of `targets` [N] and entropies after `states` [N, hidden], both [N] float32, nats."""

        def score_chunk(state: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return token_logprobs(nn.functional.linear(state, self.weight, self.bias), target, temperature)

        size = max(CHUNK_POSITIONS, CHUNK_ELEMENTS // len(self.weight))
        chunks = list(zip(states.split(size), targets.split(size), strict=True))
        again = torch.is_grad_enabled() and len(chunks) > 1  # one chunk is small enough to keep its logits
        logprobs = []
        entropies = []
        for chunk in chunks:
            if again:
                values, entropy = checkpoint(score_chunk, *chunk, use_reentrant=False)
            else:
                values, entropy = score_chunk(*chunk)
            logprobs.append(values)
            entropies.append(entropy)
        return torch.cat(logprobs), torch.cat(entropies)

    def _save_to_state_dict(self, *_: Any) -> None:
        """Nothing: the weights are saved under their name in the model."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """As little."""


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` [N] under `logits` [N, vocabulary], and the entropies, detached; both [N]
    float32, nats."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


class LogprobModel(nn.Module):
    """A causal language model whose forward pass gives completion log-probs instead of logits.

    Logits exist only at completion positions and only in chunks, so a large vocabulary does not fill the
    memory; those of a head that an adapter stands on exist whole. The weights must be whole when it is made,
    for its check.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.check()
        head = self.causal().get_output_embeddings()
        self.head = ChunkedHead(head) if type(head) is nn.Linear else None

    def causal(self) -> Any:
        """The transformers model, out of its peft wrapper where it has one."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def body(self) -> Any:
        """The transformers model without its head; the whole of it where it has no such part."""
        return self.causal().base_model

    @torch.no_grad()
    def check(self) -> None:
        """That the head's output on the body's states are the model's own logits: a model may scale, cap or
        shift them under any name.

        The two may be one rounding to the dtype apart, and the order of a sum of hidden_size float32
        products. Raises ConfigError naming the model's type and the largest difference.
        """
        causal = self.causal()
        body = self.body()
        kind = causal.config.model_type
        head = causal.get_output_embeddings()
        if body is causal or head is None:
            raise ConfigError(
                f"model.path: a model of type {kind} has no body and head that can be called apart; choose "
                "another model"
            )
        tokens = torch.arange(CHECKED, device=next(causal.parameters()).device)[None]
        tokens = tokens * (causal.config.vocab_size // CHECKED)
        training = self.model.training
        attention = causal.config._attn_implementation
        self.model.eval()
        if tokens.device.type == "cpu" and "flash" in attention:
            causal.set_attn_implementation("eager")
        own = causal(input_ids=tokens, use_cache=False).logits
        states = body(input_ids=tokens, use_cache=False).last_hidden_state
        try:
            ours = head(states)
        except RuntimeError:  # it takes states of another width: something stands between them
            ours = states
        if causal.config._attn_implementation != attention:
            causal.set_attn_implementation(attention)
        self.model.train(training)
        largest = float(own.abs().max())
        gap = float((ours - own).abs().max()) if ours.shape == own.shape else math.inf
        sum_rounding = math.sqrt(states.shape[-1]) * torch.finfo(torch.float32).eps
        rounding = torch.finfo(states.dtype).eps + sum_rounding
        if not gap <= 4 * rounding * largest:  # also where it is NaN
            raise ConfigError(
                f"model.path: a model of type {kind} makes its logits otherwise than by its head alone: they "
                f"differ by {gap:.3g}, where the largest is {largest:.3g}; choose a model that does not "
                "scale or cap its logits"
            )

    def reach(self) -> int:
        """How much masked attention a prompt token is worth (see `packing.packs_of`), 0 for a model whose
        completions cannot share a prompt.

        Per token and layer the weights cost about 24 hidden^2 operations and a pair of positions 8 hidden,
        there and back in attention. Flex attention computes none that is masked. A mask of one's own needs
        transformers' attention interface, given positions, and layers that all attend to everything before
        them.
        """
        causal = self.causal()
        config = causal.config
        if not _attends_to_all(config):
            return 0
        shares = (
            getattr(causal, "_supports_attention_backend", False)
            and not getattr(causal, "_is_stateful", False)
            and "position_ids" in inspect.signature(self.body().forward).parameters
        )
        if not shares:
            return 0
        if config._attn_implementation == "flex_attention":
            return EVERYTHING
        return 3 * int(config.hidden_size)

    def _attention_mask(self, batch: MicroBatch) -> Any:
        """Whom each position of packs may attend to, as transformers hands it on to the attention: what is
        added to the scores, or for flex attention the blocks of it that are not empty."""
        if self.causal().config._attn_implementation == "flex_attention":
            return batch.blocks()
        visible = batch.visible()
        assert visible is not None
        dtype = next(self.body().parameters()).dtype
        added = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return added.masked_fill_(~visible, torch.finfo(dtype).min)

    def forward(self, batch: MicroBatch, temperature: float = 1.0) -> TokenLogprobs:
        # without packs no mask is needed: padding stands on the right, where causal attention never looks
        layout: dict[str, Any] = {}
        if batch.segments is not None:
            layout = {"attention_mask": self._attention_mask(batch), "position_ids": batch.positions}
        hidden = self.body()(input_ids=batch.tokens, use_cache=False, **layout).last_hidden_state
        states = hidden.flatten(0, 1)[batch.source]
        if self.head is None:
            logits = self.causal().get_output_embeddings()(states)
            values, entropies = token_logprobs(logits, batch.targets, temperature)
        else:
            values, entropies = self.head(states, batch.targets, temperature)
        empty = torch.zeros(batch.mask.shape, device=values.device)
        where = batch.mask.nonzero(as_tuple=True)
        return TokenLogprobs(empty.index_put(where, values), empty.index_put(where, entropies), batch.mask)


def _attends_to_all(config: Any) -> bool:
    """Whether every layer attends to everything before a position, by an attention that takes a mask."""
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        config._attn_implementation in ("sdpa", "eager", "flex_attention")
        and getattr(config, "sliding_window", None) is None
        and set(layers) == {"full_attention"}
    )


def completion_logprobs(
    scorer: Any,
    sequences: Sequences,
    *,
    temperature: float,
    budget_tokens: int,
    device: torch.device | str = "cpu",
) -> Floats:
    """Log-probs of all completion tokens, `[sum of completion lengths]` in the order of the sequences.

    `scorer` is a Scorer, or an engine around one. Neighbours with the same prompt share its computation.
    """
    passes = passes_of(sequences, budget_tokens, scorer.reach())
    return logprobs_of_packs(scorer, sequences, passes, temperature=temperature, device=device)


def passes_of(sequences: Sequences, budget_tokens: int, reach: int) -> list[list[Pack]]:
    """The forward passes of up to `budget_tokens` that score them; `reach` is the scorer's."""
    packs = packs_of(sequences, np.arange(len(sequences)), budget_tokens=budget_tokens, reach=reach)
    passes = []
    for batch in cut_micro_batches(pack_lengths(sequences, packs), budget_tokens):
        passes.append([packs[i] for i in batch])
    return passes


@torch.no_grad()
def logprobs_of_packs(
    scorer: Any,
    sequences: Sequences,
    batches: Iterable[list[Pack]],
    *,
    temperature: float,
    device: torch.device | str,
) -> Floats:
    """The same for the rows of some packs, one forward pass a micro-batch of them; 0 in all other rows."""
    counts = (sequences.lengths - sequences.prompt_lengths).astype(np.int64)
    starts = np.cumsum(counts) - counts
    logprobs = np.zeros(int(counts.sum()), dtype=np.float32)
    for packs in batches:
        scored = scorer(pad_packs(sequences, packs, device), temperature).logprobs.cpu().numpy()
        for values, row in zip(scored, np.concatenate(packs), strict=True):
            logprobs[starts[row] : starts[row] + counts[row]] = values[: counts[row]]
    return logprobs
