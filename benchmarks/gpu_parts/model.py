"""Random weights of Qwen2.5's shapes, random batches for them, and how far two implementations are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpu_parts.card import has_card

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1000,
        "tie_word_embeddings": True,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""Qwen2.5's shapes."""
RANK = 64
"""Of the adapter."""
LENGTHS = {
    "tiny": ((8, 6, 2, 3),),
    "0.5B": ((300, 700, 8, 8), (90, 60, 16, 8)),
    "7B": ((300, 1500, 2, 8), (90, 60, 8, 8)),
}
"""Prompt, completion, groups, completions of a group: batches that the learner is timed on; the first also
tells the log-probs apart."""


def write_model(folder: Path, size: str) -> None:
    """Random weights of Qwen2, bfloat16, and a tokenizer of letters, whose other tokens are words like
    w300."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    shape = SIZES[size]
    vocabulary = shape["vocab_size"]
    config = Qwen2Config(
        **shape, max_position_embeddings=4096, bos_token_id=None, eos_token_id=vocabulary - 1
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if has_card() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)}
    words |= {f"w{i}": i for i in range(len(letters), vocabulary - 1)}
    tokenizer = Tokenizer(models.BPE(words | {"<eos>": len(words)}, merges=[]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)


def random_batch(size: str, prompt: int, completion: int, groups: int, k: int) -> Any:
    """Flat sequences; prompts are of one length in tokens, completions of that many on average."""
    from frpo.batching import flatten

    rng = np.random.default_rng(0)
    vocabulary = SIZES[size]["vocab_size"]
    pairs = []
    for _ in range(groups):
        tokens = rng.integers(3, vocabulary, prompt).astype(np.int32)
        lengths = np.clip(rng.normal(completion, completion / 5, k), 4, None).astype(int)
        pairs += [(tokens, rng.integers(3, vocabulary, length).astype(np.int32)) for length in lengths]
    return flatten(pairs)


def measure_gap(first: Any, second: Any) -> dict[str, float]:
    """How far log-probs of the same tokens by two implementations are from each other, nats a token; k3 of
    the second under the first's."""
    gap = (second - first).astype(np.float64)
    return {
        "mean": float(np.abs(gap).mean()),
        "p99": float(np.percentile(np.abs(gap), 99)),
        "max": float(np.abs(gap).max()),
        "k3_per_token": float((np.exp(gap) - 1 - gap).mean()),
        "sum_per_1000_tokens": float(gap.mean() * 1000),
    }
