"""LoRA adapters on a policy in training: the one that is trained, and beside it the one that training began
from, where a saved policy has one that merging would change (`policies.keeps_beside`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frpo import hub
from frpo.config import ConfigError, ModelConfig

TRAINED, START = "default", "start"
"""Names of the two in peft; those in the checkpoints of an engine."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as peft saves it."""

    config: str
    """adapter_config.json"""
    weights: dict[str, Tensor]
    """Under the names of adapter_model.safetensors; on whatever device, in the dtype that they are trained
    in."""


def add_adapter(policy: Any, model: ModelConfig, folder: Path) -> Any:
    """A fresh adapter on a policy that was read from `folder`; the one that it has already, named START,
    stays as it is.

    Raises ConfigError for a target that is no layer of the model, or that its weights could not be published
    with.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    assert model.lora is not None
    targets = model.lora.targets if isinstance(model.lora.targets, str) else list(model.lora.targets)
    config = LoraConfig(
        r=model.lora.rank,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        if isinstance(policy, PeftModel):
            policy.add_adapter(TRAINED, config)
            adapted: Any = policy
        else:
            adapted = get_peft_model(policy, config, TRAINED)
    except ValueError as error:  # no target fits, or one is no linear layer
        raise ConfigError(f"model.lora.targets: {error}") from None
    _check_layers(adapted, targets, folder)
    if START in adapted.peft_config:
        adapted.base_model.set_adapter([START, TRAINED])
        _freeze_start(adapted)
    return adapted


def _check_layers(adapted: Any, targets: str | list[str], folder: Path) -> None:
    """Raises ConfigError for a target that has no layer, and for a weight that is tied to another."""
    from peft.tuners.lora import LoraLayer

    layers = [name for name, layer in layers_of(adapted) if TRAINED in layer.scaling]
    for target in targets if isinstance(targets, list) else ():
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ConfigError(f"model.lora.targets: {target} is no layer of {folder}; leave it out")
    plain = adapted.get_base_model()
    words = (plain.get_input_embeddings(), plain.get_output_embeddings())
    if plain.config.tie_word_embeddings and any(isinstance(layer, LoraLayer) for layer in words):
        raise ConfigError(
            "model.lora.targets: embedding and output head are one weight here (tie_word_embeddings); leave "
            "them out"
        )


def _freeze_start(adapted: Any) -> None:
    """The adapter that training began from neither learns nor draws dropout."""
    for _, layer in layers_of(adapted):
        for weight in weights_of(layer, START):
            weight.requires_grad_(False)
        if START in layer.lora_dropout:
            layer.lora_dropout[START] = nn.Identity()


def layers_of(module: nn.Module) -> list[tuple[str, Any]]:
    """Every layer that an adapter stands on, by its name."""
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def weights_of(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    """A [r, in] and B [out, r] of one of a layer's adapters; none where it is not on the layer."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return ()


def second_matrices(module: nn.Module) -> list[Tensor]:
    """B of every adapter in training."""
    return [weights_of(layer, TRAINED)[1] for _, layer in layers_of(module) if TRAINED in layer.scaling]


def matrices_of(layer: Any) -> list[Tensor]:
    """All that `merged_weight` reads: the weight under the adapters, and theirs."""
    return [layer.get_base_layer().weight, *weights_of(layer, START), *weights_of(layer, TRAINED)]


def merged_weight(layer: Any) -> Tensor:
    """The layer's weight with its adapters in it, added up in float32 and rounded to its dtype once."""
    weight: Tensor = layer.get_base_layer().weight
    transposed = not layer.lora_A or layer.fan_in_fan_out  # [in, out]: embeddings, Conv1D
    total = weight.float()
    for adapter in (START, TRAINED):
        pair = [matrix.float() for matrix in weights_of(layer, adapter)]
        if not pair:
            continue
        left, right = reversed(pair)  # B A is [out, in]
        if transposed:
            left, right = right.T, left.T
        total = torch.addmm(total, left, right, alpha=layer.scaling[adapter])
    return total.to(weight.dtype)


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """The policy that training began from: the trained adapter adds 0 to every layer."""
    layers = [layer for _, layer in layers_of(module)]
    for layer in layers:
        layer.set_scale(TRAINED, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(TRAINED, 1.0)


def as_saved(adapted: Any, stands_on: Path) -> Adapter:
    """The adapter in training on the policy saved in `stands_on`, with the one that it began from in it where
    there is one: two products of matrices are one of their columns and rows side by side. The weights must be
    whole."""
    from peft import get_peft_model_state_dict

    base, revision = _named_base(stands_on)
    config = adapted.peft_config[TRAINED].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": base, "revision": revision}
    weights: dict[str, Tensor] = {}
    if START in adapted.peft_config:
        layers = layers_of(adapted)
        rank = max(layer.r.get(START, 0) for _, layer in layers) + config["r"]
        for at, layer in layers:
            weights[f"{at}.lora_A.weight"], weights[f"{at}.lora_B.weight"] = side_by_side(layer, rank)
        names = sorted(at.removeprefix("base_model.model.") for at, _ in layers)
        config |= {"r": rank, "lora_alpha": rank, "target_modules": names, "use_rslora": False}
    else:
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        weights = {name: tensor.detach().clone() for name, tensor in state.items()}
    return Adapter(json.dumps(config, indent=2, sort_keys=True, default=sorted), weights)


def _named_base(stands_on: Path) -> tuple[str, str | None]:
    """Name and revision on the hub; of another folder its path."""
    name = hub.name_of(str(stands_on))
    if not name:
        return str(stands_on), None
    base, revision = name.split("@")
    return base, revision


def side_by_side(layer: Any, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of both adapters at scale 1, filled up with zeros."""
    names = [name for name in (START, TRAINED) if name in layer.scaling]
    pairs = [weights_of(layer, name) for name in names]
    scaled = [b.float() * layer.scaling[name] for name, (_, b) in zip(names, pairs, strict=True)]
    all_a = torch.cat([a for a, _ in pairs])
    all_b = torch.cat(scaled, dim=1).to(all_a.dtype)
    missing = rank - len(all_a)
    return nn.functional.pad(all_a, (0, 0, 0, missing)), nn.functional.pad(all_b, (0, missing))
