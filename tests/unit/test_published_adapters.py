"""What a learner with adapters publishes are the merged weights under the base's own names, on every kind of
layer that may be named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from frpo.actors._engine import Engine
from frpo.actors.transport import store
from frpo.actors.transport.adapter import AdapterTransport
from frpo.config import TrainConfig
from frpo.logprobs import LogprobModel
from tests.support.architectures import GPT2, SMALL, build
from tests.support.policies import logprobs


@pytest.mark.parametrize(
    ("kind", "settings", "targets"),
    [
        ("Llama", {**SMALL, "tie_word_embeddings": True}, "all-linear"),
        ("Llama", SMALL, ["embed_tokens", "lm_head", "q_proj"]),
        ("Qwen2", SMALL, ["q_proj"]),  # with a bias
        ("GPT2", GPT2, "all-linear"),  # Conv1D: weights [in, out]
        ("GPT2", GPT2, ["c_proj", "wpe"]),
    ],
)
def test_published_weights_are_the_policys(kind: str, settings: dict[str, Any], targets: Any) -> None:
    base = build(kind, settings)
    names = [name for name, _ in base.named_parameters()]
    plain, fresh = logprobs(base), AutoModelForCausalLM.from_config(base.config)
    torch.manual_seed(1)
    spec = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    policy = get_peft_model(base, spec).eval()
    engine: Any = Engine.__new__(Engine)
    engine.ds, engine.train = SimpleNamespace(module=LogprobModel(policy)), TrainConfig()
    published = {name: tensor.clone() for name, tensor in engine.named_weights()}
    assert list(published) == names  # in one order, whatever has adapters
    fresh.load_state_dict(published, strict=False)
    assert float((logprobs(policy) - plain).abs().max()) > 0.01
    torch.testing.assert_close(logprobs(fresh.eval()), logprobs(policy), rtol=0, atol=1e-4)


def test_all_weights_travel_of_a_fine_tune_without_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.ray, "put", lambda value: value)
    monkeypatch.setattr(store.ray, "get", lambda ref, timeout: ref)
    base = build("Llama", SMALL)
    engine: Any = Engine.__new__(Engine)
    engine.ds, engine.train = SimpleNamespace(module=LogprobModel(base)), TrainConfig()
    engine.lora, engine.rank = False, 0
    parcel = AdapterTransport().pack(engine)
    assert isinstance(parcel, store.StoredTensors)
    sent = dict(parcel.read())
    assert sent.keys() == dict(base.named_parameters()).keys()
    for name, weight in base.named_parameters():
        assert torch.equal(sent[name], weight)
    engine.rank = 1
    assert AdapterTransport().pack(engine) is None
