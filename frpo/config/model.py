"""The policy's model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from frpo.config.section import NOTHING, Content, PathText, Positive, Section, Share


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Positive = 16
    """Scale: the update is alpha / rank * B A."""
    dropout: Share = 0.0
    """Dropout on the adapters' input in supervised fine-tuning. Reinforcement learning has none, of adapters
    or of the model's own: the ratio is to engines that have none."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of linear layers that get an adapter, in full or their last parts; all-linear leaves the output
    head out."""


class ModelConfig(Section):
    path: Annotated[PathText, Content("model")]
    """Hugging Face folder of the base policy (the reference), its hub name (organisation/name, or
    organisation/name@revision), or testbed:model. Of hub names the cache comes first."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; bfloat16 is for GPUs (6 to 35 times slower than float32 on AVX2)."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation of the learner and the scorers. It counts: not every one caps logits or has
    sinks. flex_attention is for GPUs: completions that share a prompt skip each other's positions, where sdpa
    computes and masks them."""
    deterministic: Annotated[bool, NOTHING] = False
    """On GPUs, the same bits from the same seeds, also after a resume: deterministic kernels in training and
    scoring, batch-invariant ones in the engines, whose KV cache is then rollout.kv_cache_gib. All of it is
    slower. CPUs give the same bits anyway."""
    gradient_checkpointing: Annotated[bool, NOTHING] = False
    """Recompute activations in the backward pass: less memory, about 28 % more time."""
    lora: LoraConfig | None = None
    """Train adapters by peft; null trains all weights."""
