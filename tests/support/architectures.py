"""Small untrained models of the architectures that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SMALL = {
    "vocab_size": 190,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
GPT2 = {"vocab_size": 190, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


def build(kind: str, settings: dict[str, Any], attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    net = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)  # so that what is attended to decides the numbers
    return net
