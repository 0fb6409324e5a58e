"""The reader of saved policies against peft's own forward pass, for every kind of adapter that it takes, and
what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen3MoeConfig

from frpo import policies, saved
from frpo.config import ConfigError
from tests.support.policies import SMALL, logprobs, lora, write_adapter, write_base


def by_peft(adapter: Path, base: Path) -> Tensor:
    """Unmerged, in float32."""
    return logprobs(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
        ).eval()
    )


EXACT: dict[str, Callable[[], Any]] = {
    "all linear": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(use_dora=True, rank_pattern={"v_proj": 2}),
    "patterns": lambda: lora(
        rank_pattern={"v_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        alpha_pattern={"q_proj": 64},
        use_rslora=True,
    ),
    "embedding and head": lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "embedding and head saved whole": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "norm saved whole": lambda: lora(modules_to_save=["norm"]),
    "tokens": lambda: lora(trainable_token_indices=[3, 5]),
}
RARE: dict[str, Callable[[], Any]] = {
    "layers": lambda: lora(layers_to_transform=[1]),
    "exclude": lambda: lora(target_modules="all-linear", exclude_modules=["q_proj"]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "adalora": lambda: AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "lokr": lambda: LoKrConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: OFTConfig(target_modules=["q_proj"], oft_block_size=8, task_type="CAUSAL_LM"),
    "boft": lambda: BOFTConfig(target_modules=["q_proj"], boft_block_size=8, task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(target_modules=["q_proj"], r=8, task_type="CAUSAL_LM"),
    "fourierft": lambda: FourierFTConfig(target_modules=["q_proj"], n_frequency=50, task_type="CAUSAL_LM"),
    "hra": lambda: HRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "miss": lambda: MissConfig(target_modules=["q_proj"], r=8, task_type="CAUSAL_LM"),
    "shira": lambda: ShiraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"),
    "layer norms": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "trainable tokens": lambda: TrainableTokensConfig(
        token_indices=[1, 9], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.mark.parametrize("kind", [*EXACT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in RARE)])
def test_an_adapter_gives_pefts_own_logprobs(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, (EXACT | RARE)[kind]())
    truth, without = by_peft(adapter, base), logprobs(AutoModelForCausalLM.from_pretrained(base))
    assert float((truth - without).abs().max()) > 1e-3  # the adapter moves the policy
    policy = policies.read_policy(adapter, dtype="float32")
    assert float((logprobs(policy) - truth).abs().max()) <= 1e-5
    fresh = AutoModelForCausalLM.from_pretrained(base)
    assert not fresh.load_state_dict(
        dict(policies.read_weights(adapter, torch.float32)), strict=True
    ).missing_keys
    assert float((logprobs(fresh) - truth).abs().max()) <= 1e-5


def test_a_base_and_an_adapter_saved_in_bfloat16_are_merged_in_float32(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(
        tmp_path / "adapter", base, lora(use_dora=True, rank_pattern={"v_proj": 2}), dtype=torch.bfloat16
    )
    policy = policies.read_policy(adapter, dtype="float32")
    truth = by_peft(adapter, base)
    assert float((logprobs(policy) - truth).abs().max()) <= 1e-5
    weight = policy.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(weight, weight.bfloat16().float())  # nothing was rounded on the way


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_the_merged_weights_are_rounded_to_the_dtype(attention: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, lora())
    whole = policies.read_policy(adapter, dtype="float32")
    whole.save_pretrained(tmp_path / "merged")
    truth = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16, attn_implementation=attention
    )
    policy = policies.read_policy(adapter, dtype="bfloat16", attention=attention)
    assert policy.config._attn_implementation == attention
    assert {n: (t.dtype, t.sum().item()) for n, t in policy.state_dict().items()} == {
        n: (t.dtype, t.sum().item()) for n, t in truth.state_dict().items()
    }
    assert torch.equal(logprobs(policy), logprobs(truth))  # rotary frequencies too
    assert {t.dtype for _, t in policies.read_weights(adapter, "bfloat16")} == {torch.bfloat16}


def test_an_adapter_on_an_adapter(base: Path, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "first", base, lora())
    policies.read_policy(first, dtype="float32").save_pretrained(tmp_path / "merged")
    second = write_adapter(tmp_path / "second", tmp_path / "merged", lora(use_dora=True), name=str(first))
    truth = by_peft(second, tmp_path / "merged")
    assert float((logprobs(policies.read_policy(second, dtype="float32")) - truth).abs().max()) <= 1e-5
    assert saved.base_of(second) == base


def test_a_relative_base_is_found_from_here_or_from_the_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = write_base(tmp_path / "there" / "base")
    (tmp_path / "here").mkdir()
    for name, working in (("there/base", tmp_path), ("../base", tmp_path / "here")):
        monkeypatch.chdir(working)
        adapter = write_adapter(tmp_path / "there" / "adapter", beside, lora(), name=name)
        truth = by_peft(adapter, beside)
        assert float((logprobs(policies.read_policy(adapter, dtype="float32")) - truth).abs().max()) <= 1e-5


def test_a_full_folder_is_streamed_as_it_was_saved(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    save_file(
        {"layers.0.attention.wq.weight": torch.zeros(2)}, tmp_path / "shards" / "consolidated.safetensors"
    )  # as Mistral's folders
    streamed = dict(policies.read_weights(tmp_path / "shards", "float32"))
    assert len(saved.weight_files(tmp_path / "shards")) > 2
    truth = dict(model.named_parameters())
    assert set(streamed) == set(truth)
    assert all(torch.equal(streamed[n], truth[n]) for n in truth)


def test_the_tokenizer_is_the_adapters_own_or_its_bases(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, lora())
    assert saved.tokenizer_folder(adapter) == base
    (adapter / "tokenizer_config.json").write_text("{}")
    assert saved.tokenizer_folder(adapter) == adapter
    assert saved.tokenizer_folder(base) == base


def test_biases_and_transposed_weights(tmp_path: Path) -> None:
    biased = write_base(tmp_path / "biased", config=Qwen2Config(**SMALL, tie_word_embeddings=True))
    turned = write_base(
        tmp_path / "turned", config=GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    )
    for name, base, config in (
        ("trained", biased, lora(bias="lora_only", target_modules=["q_proj"])),
        ("added", biased, lora(lora_bias=True, target_modules=["k_proj"])),
        ("conv1d", turned, lora(target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True)),
    ):
        adapter = write_adapter(tmp_path / name, base, config)
        assert (
            float(
                (logprobs(policies.read_policy(adapter, dtype="float32")) - by_peft(adapter, base))
                .abs()
                .max()
            )
            <= 1e-5
        )


# ---- what is refused


REFUSED: dict[str, tuple[Any, str]] = {
    "prompt tuning": (
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "peft_type: PROMPT_TUNING cannot be merged",
    ),
    "prefix tuning": (
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "peft_type: PREFIX_TUNING cannot be merged",
    ),
    "activated": (
        lora(alora_invocation_tokens=[3, 4]),
        r"alora_invocation_tokens: \[3, 4\] cannot be merged",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_are_no_weights_are_refused_by_name(kind: str, base: Path, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    adapter = write_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(ConfigError, match=message):
        policies.read_policy(adapter, dtype="float32")
    with pytest.raises(ConfigError, match=message):
        policies.read_weights(adapter, "float32")  # before the first tensor


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "output head"),
        ({"target_modules": ["embed_tokens"]}, "other log-probs than peft's own"),
        ({"target_modules": ["lm_head"]}, "other log-probs than peft's own|output head"),
    ],
)
def test_a_head_apart_from_a_tied_embedding_is_refused(
    fields: dict[str, Any], message: str, tied: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied, lora(**fields))
    with pytest.raises(ConfigError, match=message):
        policies.read_policy(adapter, dtype="float32")


def altered(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, adapter / "adapter_model.safetensors")
    return adapter


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.long
def test_every_key_of_the_adapter_is_used_or_named(base: Path, tmp_path: Path) -> None:
    def write() -> Path:
        return write_adapter(tmp_path / "adapter", base, lora(modules_to_save=["lm_head"]))

    def load(change: Callable[[dict[str, Tensor]], Any]) -> None:
        policies.read_policy(altered(write(), change), dtype="float32")

    with pytest.raises(ConfigError, match=r"no place for: base_model\.model\.odd"):
        load(lambda s: s.update({"base_model.model.odd": torch.zeros(1)}))
    with pytest.raises(ConfigError, match=r"no place for: base_model.*layers.9.self_attn"):
        load(lambda s: s.update({KEY.replace("layers.1", "layers.9"): s.pop(KEY)}))
    with pytest.raises(ConfigError, match=r"lacks weights: base_model.*layers.1.self_attn.q_proj"):
        load(lambda s: s.pop(KEY))
    with pytest.raises(ConfigError, match=r"lacks .*lm_head"):
        load(lambda s: s.pop("base_model.model.lm_head.weight"))
    with pytest.raises(ConfigError, match="size mismatch"):
        load(lambda s: s.update({KEY: torch.zeros(4, 16)}))


def test_a_base_that_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, lora())
    file = adapter / saved.ADAPTER
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_tomorrows_variant": True, "left_out": None}))
    with pytest.raises(ConfigError, match="the installed peft does not know use_tomorrows_variant;"):
        policies.read_policy(adapter, dtype="float32")
    for name, message in (
        (None, "is None"),
        (str(tmp_path / "gone"), "no such folder"),
        (str(adapter), "stands on itself"),
    ):
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(ConfigError, match=rf"adapter_config.json: base_model_name_or_path.*{message}"):
            policies.read_policy(adapter, dtype="float32")
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config.json: cannot be read"):
        policies.read_policy(adapter, dtype="float32")
    file.write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match="safe_serialization=True"):
        policies.read_policy(adapter, dtype="float32")


def test_weights_that_the_files_lack_are_named_not_drawn(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.save_pretrained(tmp_path / "headless")  # as a class without a head saves it
    with pytest.raises(
        ConfigError, match=r"headless: its files lack weights of the model: lm_head\.weight; save it again"
    ):
        policies.read_policy(tmp_path / "headless", dtype="float32")


def test_a_mixture_of_experts_is_refused_by_its_weights(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, head_dim=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    with pytest.raises(ConfigError, match=r"moe: a mixture of experts \(model_type qwen3_moe\)"):
        policies.read_policy(tmp_path / "moe", dtype="float32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "its weights are of other shapes than config.json says: lm_head.weight, "),
        (
            {"vocab_size": 65},
            "its weights are of other shapes than config.json says: lm_head.weight, "
            "model.embed_tokens.weight;",
        ),
        ({"hidden_act": "nosuch"}, "transformers cannot load it with attention sdpa (KeyError: 'nosuch')"),
        ({"num_attention_heads": 3}, "is not a multiple of the number of attention heads"),
        ({"rms_norm_eps": "a"}, "Field 'rms_norm_eps' expected float"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys"),
        ({"pad_token_id": 9999}, "Padding_idx must be within"),
    ],
)
def test_a_configuration_that_is_not_of_the_weights_is_named(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write_base(tmp_path / "m") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ConfigError) as raised:
        policies.read_policy(tmp_path / "m", dtype="float32")
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": 3},
        {"target_modules": "("},
        {"rank_pattern": 3},
        {"alpha_pattern": {"(": 1}},
        {"megatron_config": {"a": 1}},
    ],
)
def test_an_adapter_of_odd_settings_is_named(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a", base, lora()) / saved.ADAPTER
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ConfigError, match="peft cannot apply the adapter of kind LORA"):
        policies.read_policy(tmp_path / "a", dtype="float32")
