"""A saved policy made ready for training: read, with an adapter on it and without dropout where asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from frpo import policies
from frpo.actors import _adapters
from frpo.config import ModelConfig
from frpo.logprobs import LogprobModel


def load_trainable(folder: Path, model: ModelConfig) -> Any:
    """The transformers model, or the PeftModel with a fresh adapter, on the CPU."""
    if model.lora is None:
        policy = policies.read_policy(folder, dtype=model.dtype, attention=model.attention)
        policy.requires_grad_(True)  # peft leaves the weights frozen that an adapter was merged into
    else:
        policy = policies.load_beside(
            folder, dtype=model.dtype, attention=model.attention, name=_adapters.START
        )
    if model.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if model.lora is not None:
            policy.enable_input_require_grads()
    if model.lora is not None:
        policy = _adapters.add_adapter(policy, model, folder)
    return policy


def silence_dropout(scorer: LogprobModel) -> None:
    """`without_dropout`; the policy is exported with the rates of its configuration, for whoever trains it
    next."""
    exported = copy.deepcopy(scorer.causal().config)
    without_dropout(scorer)
    scorer.causal().config = exported


def without_dropout(policy: nn.Module) -> None:
    """Make every forward pass that of evaluation, so that training draws no noise: adapters' dropout, the
    model's own, and skipped layers.

    Modules hold a rate as `p` of a Dropout, or under a name with "drop" in it; some read it from the
    configuration at each pass.
    """
    for module in policy.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _without_rates(module)
        config = getattr(module, "config", None)
        if config is not None:
            _without_rates(config)


def _without_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)
