"""The sizes of a decoder-only transformer, from its config.json alone. Pure; imports no ML library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frpo.config import LoraConfig

EMBEDDED: dict[str, Any] = {
    "vocab_size": 192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip
"""Of testbed:model, as a config.json names them."""
BYTES = {"float32": 4, "bfloat16": 2}
CHUNK_ELEMENTS, CHUNK_POSITIONS = 1 << 24, 256
"""Logits computed at once (positions x vocabulary), 64 MiB in float32; positions at least."""
BUDGET_TOKENS = 8192
"""Padded tokens of one forward pass of a scorer, and tokens of a block. Whoever scores a policy takes the
same blocks in the same passes: its log-probs are then the same numbers, in bfloat16 too."""


@dataclass(frozen=True)
class Shape:
    """Llama's layout: grouped attention, a gated MLP, two norms a layer. Others differ from it by some
    percent."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by the last part of their names."""
        h, f, q, kv = (
            self.hidden,
            self.intermediate,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    @property
    def weights(self) -> int:
        matrices = sum(a * b for a, b in self.linear.values())
        return (
            self.layers * (matrices + 2 * self.hidden)
            + self.hidden
            + self.vocabulary * self.hidden * (1 if self.tied else 2)
        )

    @property
    def kv_per_token(self) -> int:
        """Numbers that the KV cache keeps of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapters(self, lora: LoraConfig) -> int:
        """Weights of adapters on the targets."""
        on = [
            dims
            for name, dims in self.linear.items()
            if lora.targets == "all-linear" or any(t.endswith(name) for t in lora.targets)
        ]
        return self.layers * lora.rank * sum(a + b for a, b in on)


def shape_of(model: Mapping[str, Any]) -> Shape | None:
    """Of the contents of a config.json; None for one that names its sizes otherwise."""
    try:
        hidden, heads = int(model["hidden_size"]), int(model["num_attention_heads"])
        return Shape(
            hidden=hidden,
            layers=int(model["num_hidden_layers"]),
            intermediate=int(model["intermediate_size"]),
            heads=heads,
            kv_heads=int(model.get("num_key_value_heads") or heads),
            head_dim=int(model.get("head_dim") or hidden // heads),
            vocabulary=int(model["vocab_size"]),
            tied=bool(model.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError):
        return None
