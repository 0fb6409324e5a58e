"""Small data and independent formulas for the tests of actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from frpo import testbed
from frpo.batching import flatten
from frpo.types import Floats, Prompt, Sequences
from tests.support.recipes import ROOT, config

__all__ = ["ROOT", "config"]


def load_hf(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def in_bfloat16(policy: Path, folder: Path) -> Path:
    """Write the policy, rounded, with its tokenizer."""
    model, tokenizer = load_hf(policy)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(tokenizer: Any, count: int) -> list[Prompt]:
    items = list(testbed.harmless_items())[:count]
    return [
        Prompt(
            f"p:{i}",
            item.prompt,
            np.array(tokenizer(item.prompt)["input_ids"], np.int32),
            item.task,
            {"answer": item.answer},
        )
        for i, item in enumerate(items)
    ]


def sequences(count: int, seed: int = 0, vocabulary: int = 190, group: int = 1) -> Sequences:
    """Random sequences of uneven lengths: prompts of 2-9 tokens, `group` neighbours to each, completions of
    1-7."""
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(4, vocabulary, rng.integers(2, 10)).astype(np.int32) for _ in range(-(-count // group))
    ]
    return flatten(
        [
            (prompts[i // group], rng.integers(4, vocabulary, rng.integers(1, 8)).astype(np.int32))
            for i in range(count)
        ]
    )


def naive_logprobs(model: Any, data: Sequences) -> Floats:
    """One forward pass per sequence, full logits, plain log_softmax."""
    logprobs, end = [], 0
    for length, prompt in zip(data.lengths, data.prompt_lengths, strict=True):
        ids = torch.from_numpy(data.tokens[end : end + length].astype(np.int64))
        end += int(length)
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
        logprobs += [float(logp[t - 1, ids[t]]) for t in range(int(prompt), int(length))]
    return np.array(logprobs, dtype=np.float32)


def perturbed(model: Any, scale: float, seed: int) -> Any:
    """Move every weight, so that no layer's old copy can pass for the new one."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * scale * (p.abs().mean() + 1e-3))
    return model


def write_speller(folder: Path) -> None:
    """An untrained model that can spell any text: a token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {
        c: i for i, c in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            eos_token_id=1,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
