"""What a model's folder tells before anything starts: each kind that cannot be trained or published is
refused by field and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from frpo.config import Config, ConfigError
from frpo.model_checks import check_policy, check_reward_model
from frpo.recipe import load_recipe

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
SHAPES = {
    "model.embed_tokens.weight": (96, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 128),
    "model.layers.0.input_layernorm.weight": (64,),
    "lm_head.weight": (96, 64),
}


def write(folder: Path, *without: str, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    save_file(
        {n: np.zeros(s, np.float16) for n, s in SHAPES.items() if n not in without},
        folder / "model.safetensors",
    )
    return folder


def config(model: Path, *sets: str) -> Config:
    return load_recipe(ROOT / "recipes" / "testbed.yaml", (f"model.path={model}", *sets))


def refusal(model: Path, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_policy(config(model, *sets))
    return str(caught.value)


KINDS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "hidden_size 64: no value that it can have"),
    ({"num_attention_heads": 0}, "num_attention_heads 0: no value that it can have"),
    ({"max_position_embeddings": [64]}, "max_position_embeddings [64]: no value that it can have"),
    ({"rope_scaling": "yarn"}, "rope_scaling yarn: no value that it can have"),
    ({"architectures": "LlamaForCausalLM"}, "architectures LlamaForCausalLM: no value that it can have"),
    ({"architectures": [None]}, "architectures [None]: no value that it can have"),
    ({"num_experts": 128, "model_type": "qwen3"}, "num_experts 128: a mixture of experts"),
    ({"num_local_experts": 8}, "num_local_experts 8: a mixture of experts"),
    ({"n_routed_experts": 64}, "n_routed_experts 64: a mixture of experts"),
    ({"moe_num_experts": 64}, "moe_num_experts 64: a mixture of experts"),
    ({"ffn_config": {"moe_num_experts": 16}}, "ffn_config.moe_num_experts 16: a mixture of experts"),
    ({"model_type": "mixtral"}, "model_type mixtral: a mixture of experts"),
    ({"model_type": "qwen3_moe"}, "model_type qwen3_moe: a mixture of experts"),
    ({"model_type": "deepseek_v3"}, "model_type deepseek_v3: a mixture of experts"),
    ({"logits_scaling": 8.0}, "logits_scaling 8.0: it scales or caps its logits"),
    ({"logit_scale": 0.0625}, "logit_scale 0.0625: it scales or caps its logits"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0: it scales or caps its logits"),
    ({"logits_soft_cap": 30}, "logits_soft_cap 30: it scales or caps its logits"),
    ({"output_logit_soft_cap": 15.0}, "output_logit_soft_cap 15.0: it scales or caps its logits"),
    ({"lm_head_multiplier": 0.02}, "lm_head_multiplier 0.02: it scales or caps its logits"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: quantized weights"),
    (
        {"vision_config": {"hidden_size": 8}, "text_config": {"vocab_size": 96}},
        "vision_config: a model of more than text",
    ),
    ({"text_config": {"final_logit_softcapping": 30.0}}, "text_config: a model of more than text"),
    ({"thinker_config": {"audio_config": {}, "a": 1}}, "thinker_config: a model of more than text"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder True: an encoder with a decoder"),
    (
        {"architectures": ["T5ForConditionalGeneration"]},
        "architectures T5ForConditionalGeneration: no causal language model",
    ),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures LlamaForSequenceClassification: no causal language model",
    ),
    ({"architectures": ["LlamaModel"]}, "architectures LlamaModel: no causal language model"),
    (
        {"model_type": "my_llm", "auto_map": {"AutoModelForCausalLM": "modeling.My"}},
        "model_type my_llm, which the installed transformers",
    ),
]


@pytest.mark.parametrize(("fields", "message"), KINDS, ids=[m.partition(":")[0] for _, m in KINDS])
def test_what_cannot_be_trained_is_refused_by_field_and_value(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    said = refusal(write(tmp_path / "model", **fields))
    assert said.startswith(f"model.path: {tmp_path / 'model' / 'config.json'} has {message}")
    assert ";" in said  # and a remedy


@pytest.mark.parametrize(
    "fields",
    [
        {
            "logits_scaling": 1.0,
            "logit_scale": 1,
            "final_logit_softcapping": None,
            "lm_head_multiplier": 1.0,
            "logits_soft_cap": 0,
        },
        {
            "attn_logit_softcapping": 50.0,
            "embedding_multiplier": 12.0,
            "router_logit_scale": 3.0,
            "residual_multiplier": 0.2,
        },
        {
            "num_experts": None,
            "num_local_experts": 0,
            "n_routed_experts": 1,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
        },
        {
            "quantization_config": None,
            "vision_config": None,
            "is_encoder_decoder": False,
            "rope_scaling": {"rope_type": "default"},
        },
        {
            "auto_map": {"AutoModelForCausalLM": "modeling_llama.Llama"}
        },  # an old folder's code: transformers has its own
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": None, "model_type": None},
    ],
)
def test_neutral_values_and_missing_fields_pass(fields: dict[str, Any], tmp_path: Path) -> None:
    check_policy(config(write(tmp_path / "model", **fields)))


@pytest.mark.parametrize(
    ("targets", "tied", "message"),
    [
        ("[q_proj, qkv_proj]", False,
         "model.lora.targets.1: qkv_proj is no linear layer of {}; "
         "give names out of down_proj, q_proj, or all-linear"),
        ("[input_layernorm]", False, "model.lora.targets.0: input_layernorm is no linear layer"),
        ("[mlp]", False, "model.lora.targets.0: mlp is no linear layer"),
        # a name's last letters are no name
        ("[j_proj]", False, "model.lora.targets.0: j_proj is no linear layer"),
        ("[q_proj, lm_head]", True,
         "model.lora.targets.1: lm_head: embedding and output head are one weight here"),
        ("[embed_tokens]", True,
         "model.lora.targets.0: embed_tokens: embedding and output head are one weight here"),
    ],
)  # fmt: skip
def test_targets_of_adapters(targets: str, tied: bool, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", *(("lm_head.weight",) if tied else ()), tie_word_embeddings=tied)
    assert message.format(folder) in refusal(folder, f"model.lora.targets={targets}")


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, mlp.down_proj]", "[lm_head, embed_tokens]"])
def test_targets_that_can_be_published(targets: str, tmp_path: Path) -> None:
    check_policy(config(write(tmp_path / "model"), f"model.lora.targets={targets}"))


def test_an_adapter_as_the_model_is_checked_with_its_base(tmp_path: Path) -> None:
    base, adapter = write(tmp_path / "base", num_experts=8), tmp_path / "adapter"
    adapter.mkdir()
    spec = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(spec))
    assert "has no adapter_model.safetensors" in refusal(adapter)
    save_file({"a": np.zeros(2)}, adapter / "adapter_model.safetensors")
    assert f"{base / 'config.json'} has num_experts 8" in refusal(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**spec, "peft_type": "PREFIX_TUNING"}))
    assert (
        "peft_type: PREFIX_TUNING cannot be merged into a model's weights; save the policy as a full model"
        in refusal(adapter)
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"torn")
    (adapter / "adapter_config.json").write_text(json.dumps(spec))
    assert "adapter_model.safetensors is torn" in refusal(adapter)


def test_a_reward_model_needs_a_trained_head(tmp_path: Path) -> None:
    good = write(
        tmp_path / "good", architectures=["LlamaForSequenceClassification"], logits_scaling=8.0, num_experts=4
    )
    check_reward_model("rewards.0.path", str(good))  # its score is no log-prob, and it is loaded once
    chat = write(tmp_path / "chat")
    with pytest.raises(
        ConfigError,
        match=r"^rewards\.0\.path: .* has architectures LlamaForCausalLM: its score would come from a head",
    ):
        check_reward_model("rewards.0.path", str(chat))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": null}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {}}',
        "[" * 20_000,
    ],
)
def test_an_index_that_is_torn_is_named(text: str, tmp_path: Path) -> None:
    (write(tmp_path / "m") / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: " in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "NOSUCH"}, "peft_type: 'NOSUCH' is no kind that the installed peft knows"),
        ({"peft_type": ["LORA"]}, "peft_type: ['LORA'] is no kind that the installed peft knows"),
        ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path: no such folder"),
    ],
)
def test_an_adapter_of_no_kind_or_on_no_base_is_named(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base")
    (tmp_path / "a").mkdir()
    save_file({"a": np.zeros(1, np.float16)}, tmp_path / "a" / "adapter_model.safetensors")
    applied = {"peft_type": "LORA", "base_model_name_or_path": str(base), **fields}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(applied))
    assert message in refusal(tmp_path / "a")
