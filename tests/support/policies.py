"""Saved policies of a model of two small layers: its weights and adapters on them, every number of which
counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = torch.tensor([[5, 9, 2, 63, 0, 17, 31, 40]])


def write_base(
    folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, config: Any = None
) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that what is attended to decides the numbers
    model.to(dtype).save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path, base: Path, config: Any, name: str | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """An adapter whose every trained weight is moved from where peft starts it."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = name or str(base)
    model.to(dtype).save_pretrained(folder)
    return folder


def logprobs(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(TOKENS).logits.float(), -1)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "task_type": "CAUSAL_LM",
            **fields,
        }
    )
