"""The sizes of a decoder-only transformer, from its config.json alone. Pure; imports no ML library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frpo.config import LoraConfig

EMBEDDED: dict[str, Any] = {
    "vocab_size": 192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip
"""Of testbed:model, as a config.json names them."""
BYTES = {"float32": 4, "bfloat16": 2}
CHUNK_ELEMENTS = 1 << 24
"""Logits computed at once (positions x vocabulary), 64 MiB in float32."""
CHUNK_POSITIONS = 256
"""Positions computed at once, at least, however large the vocabulary."""
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
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def weights(self) -> int:
        """Number of all weights: of the layers with two norms each, a last norm, embedding and head."""
        matrices = sum(inputs * outputs for inputs, outputs in self.linear.values())
        embedding = self.vocabulary * self.hidden
        head = 0 if self.tied else embedding
        return self.layers * (matrices + 2 * self.hidden) + self.hidden + embedding + head

    @property
    def kv_per_token(self) -> int:
        """Numbers that the KV cache keeps of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapters(self, lora: LoraConfig) -> int:
        """Number of weights of adapters on the targets: a matrix of rank r on each side of a layer's own."""
        sides = 0
        for name, (inputs, outputs) in self.linear.items():
            if lora.targets == "all-linear" or any(target.endswith(name) for target in lora.targets):
                sides += inputs + outputs
        return self.layers * lora.rank * sides


def shape_of(model: Mapping[str, Any]) -> Shape | None:
    """Of the contents of a config.json; None for one that names its sizes otherwise."""
    try:
        hidden = int(model["hidden_size"])
        heads = int(model["num_attention_heads"])
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
