"""Reinforcement learning trains without noise: a pass in training mode is that of evaluation, for all that a
model or an adapter draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from frpo.actors._trainable import without_dropout
from frpo.logprobs import LogprobModel
from frpo.packing import pad_packs
from tests.support.architectures import GPT2, SMALL, build
from tests.support.models import sequences

NOISY: dict[str, dict[str, Any]] = {
    "Llama": {**SMALL, "attention_dropout": 0.5},
    "GPT2": GPT2,  # 0.1 in four places by default
    "OPT": {
        **SMALL,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "dropout": 0.3,
        "layerdrop": 0.5,
    },
    "Falcon": {
        **SMALL,
        "hidden_dropout": 0.3,
        "attention_dropout": 0.3,
    },  # read from the configuration at each pass
    "GPTNeoX": {**SMALL, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "Phi": {**SMALL, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
}


def passes(scorer: LogprobModel) -> tuple[Tensor, Tensor, Tensor]:
    """Two in training mode, one in evaluation mode."""
    batch = pad_packs(sequences(6), list(np.arange(6)[:, None]))
    torch.manual_seed(0)
    with torch.no_grad():
        return scorer.train()(batch).logprobs, scorer.train()(batch).logprobs, scorer.eval()(batch).logprobs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", NOISY)
def test_a_models_own_dropout(kind: str, attention: str) -> None:
    scorer = LogprobModel(build(kind, NOISY[kind], attention))
    first, second, plain = passes(scorer)
    assert not torch.equal(first, second)  # the noise is there
    without_dropout(scorer)
    first, second, still = passes(scorer)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-5)
    assert torch.equal(still, plain)


def test_dropout_of_adapters() -> None:
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    scorer = LogprobModel(get_peft_model(build("Llama", SMALL), config))
    first, second, plain = passes(scorer)
    assert not torch.equal(first, second)
    without_dropout(scorer)
    first, second, _ = passes(scorer)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-5)
    assert scorer.model.peft_config["default"].lora_dropout == 0.5  # as it is exported
