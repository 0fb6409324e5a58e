"""What updates a policy: the optimiser, its schedule, and the configuration of DeepSpeed around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from frpo.config import ModelConfig, TrainConfig


def learning_rate_factor(config: TrainConfig, num_updates: int) -> Callable[[int], float]:
    """Share of the peak learning rate at each update (from 0): linear warm-up, then the schedule."""
    warmup = round(config.warmup_share * num_updates)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        done = min(1.0, (update - warmup) / max(1, num_updates - warmup))
        if config.schedule == "linear":
            return 1 - (1 - config.final_share) * done
        if config.schedule == "cosine":
            return config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * done)) / 2
        return 1.0

    return factor


def deepspeed_config(model: ModelConfig, train: TrainConfig, world_size: int) -> dict[str, Any]:
    """Gradients accumulate and are reduced in float32, whatever the model's dtype.

    ZeRO-1 in bfloat16 runs as ZeRO-2: DeepSpeed gives its float32 sums to another optimiser, which counts
    each micro-batch of ours again (gradient norm 36.9 where it is 0.654, 101 micro-batches;
    `_do_optimizer_sanity_check` in deepspeed/runtime/engine.py).
    """
    half = model.dtype == "bfloat16"
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if half:
        zero["stage"] = max(train.zero_stage, 2)
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_batch_size": world_size,  # nominal: micro-batches are ours
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # backward accumulates, step is the boundary
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if half:
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return config


def adamw_of(trained: list[torch.nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(trained, train.weight_decay), lr=train.learning_rate, fused=True)


def decay_groups(trained: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: norms and biases (one dimension) do not decay, matrices and embeddings do. Without
    decay there is one group, and no group is empty, which DeepSpeed does not take."""
    decayed = [parameter for parameter in trained if parameter.ndim > 1 or weight_decay == 0]
    plain = [parameter for parameter in trained if parameter.ndim <= 1 and weight_decay > 0]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
