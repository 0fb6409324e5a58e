"""An adapter that is trained beside the one that a policy has already, against peft's own sum of the two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from frpo import policies, saved
from frpo.actors import _adapters
from frpo.actors._adapters import START, TRAINED
from frpo.actors._trainable import load_trainable
from frpo.actors._way import Way
from frpo.config import LoraConfig, ModelConfig
from tests.support.policies import logprobs, lora, write_adapter, write_base

MODEL = ModelConfig(
    path="any", dtype="bfloat16", lora=LoraConfig(rank=3, alpha=7, targets=("v_proj", "up_proj"), dropout=0.5)
)
"""Its layers are not those of the adapter that it stands beside, and its scale is no power of two."""


def adapted(base: Path, start: Path | None = None) -> Any:
    """A policy in training, float32 for exact comparisons, with a trained adapter that does something."""
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = PeftModel.from_pretrained(policy, start, START) if start else policy
    policy = _adapters.add_adapter(policy, MODEL, base).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for _, layer in _adapters.layers_of(policy):
            for weight in _adapters.weights_of(layer, TRAINED):
                weight.add_(0.2 * torch.randn_like(weight))
    return policy


def loaded(adapter: _adapters.Adapter, base: Path, folder: Path) -> Tensor:
    """Log-probs of what is saved, by peft."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / saved.ADAPTER).write_text(adapter.config)
    save_file({n: t.contiguous() for n, t in adapter.weights.items()}, folder / saved.WEIGHTS)
    assert saved.plain_rank(folder) == saved.read_json(folder / saved.ADAPTER)["r"]
    return logprobs(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
        ).eval()
    )


def test_both_are_one_adapter_where_they_are_saved_and_one_weight_where_they_are_merged(
    tmp_path: Path,
) -> None:
    base = write_base(tmp_path / "base")
    start = write_adapter(
        tmp_path / "start",
        base,
        lora(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 64}, use_rslora=True),
    )
    policy = adapted(base, start)
    truth = logprobs(policy)
    torch.testing.assert_close(
        loaded(_adapters.as_saved(policy, base), base, tmp_path / "both"), truth, atol=1e-5, rtol=0
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    named = dict(plain.named_parameters())
    with torch.no_grad():
        for at, layer in _adapters.layers_of(policy):
            named[at.removeprefix("base_model.model.") + ".weight"].copy_(_adapters.merged_weight(layer))
    torch.testing.assert_close(logprobs(plain), truth, atol=1e-5, rtol=0)
    alone = logprobs(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), start
        ).eval()
    )
    assert (alone - truth).abs().max() > 0.1


def test_an_adapter_alone_is_saved_as_it_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    policy = adapted(base)
    saved = _adapters.as_saved(policy, base)
    assert {t.shape[0] for name, t in saved.weights.items() if "lora_A" in name} == {3}
    torch.testing.assert_close(loaded(saved, base, tmp_path / "alone"), logprobs(policy), atol=1e-5, rtol=0)


def test_switched_off_it_is_the_policy_that_training_began_from_and_comes_back(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    start = write_adapter(tmp_path / "start", base, lora())
    for folder in (None, start):
        policy, before = (
            adapted(base, folder),
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(),
        )
        before = PeftModel.from_pretrained(before, folder).eval() if folder else before
        now = logprobs(policy)
        with _adapters.switched_off(policy):
            torch.testing.assert_close(logprobs(policy), logprobs(before), atol=0, rtol=0)
        torch.testing.assert_close(logprobs(policy), now, atol=0, rtol=0)
        assert (now - logprobs(before)).abs().max() > 0.1


def test_merged_weights_lie_on_the_straight_way_from_where_training_began(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    start = write_adapter(tmp_path / "start", base, lora())
    for folder in (None, start):
        policy = adapted(base, folder)
        layers = _adapters.layers_of(policy)
        ends = [_adapters.merged_weight(layer) for _, layer in layers]
        with _adapters.switched_off(policy):
            begins = [_adapters.merged_weight(layer) for _, layer in layers]
        trained = _adapters.second_matrices(policy)
        assert len(trained) == 2 * 2  # layers, targets
        way = Way(trained)
        way.start = [torch.zeros_like(weight) for weight in trained]  # B of a fresh adapter
        for share in (0.3, 1.0, 0.0):
            way.go(share)
            for (_, layer), begin, end in zip(layers, begins, ends, strict=True):
                truth = begin + share * (end - begin)
                torch.testing.assert_close(_adapters.merged_weight(layer), truth, atol=1e-6, rtol=0)
        moved = [float((end - begin).abs().max()) for begin, end in zip(begins, ends, strict=True)]
        assert sum(largest > 0.1 for largest in moved) == 2 * 2


def test_the_trained_one_alone_is_trained_and_drops_out(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    policy = adapted(base, write_adapter(tmp_path / "start", base, lora(lora_dropout=0.9)))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in policy.named_parameters() if f".{TRAINED}." in n}
    assert len(trained) == 2 * 2 * 2  # layers, targets, matrices
    assert not torch.equal(logprobs(policy.train()), logprobs(policy))
    silent = copy.deepcopy(policy)
    for _, layer in _adapters.layers_of(silent):
        layer.set_scale(TRAINED, 0.0)
    torch.testing.assert_close(logprobs(silent.train()), logprobs(silent.eval()), atol=0, rtol=0)


def test_all_weights_are_trained_where_an_adapter_was_merged_into_them(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    start = write_adapter(tmp_path / "start", base, lora())
    for folder in (base, start):
        policy = load_trainable(folder, ModelConfig(path="any"))
        trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
        plain = AutoModelForCausalLM.from_pretrained(base).named_parameters()
        assert trained == {name for name, _ in plain}


def test_only_where_merging_would_round_it_away(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    plain, dora = (
        write_adapter(tmp_path / "plain", base, lora()),
        write_adapter(tmp_path / "dora", base, lora(use_dora=True)),
    )
    assert policies.keeps_beside(plain, "bfloat16")
    assert not any(
        (
            policies.keeps_beside(plain, "float32"),
            policies.keeps_beside(dora, "bfloat16"),
            policies.keeps_beside(base, "bfloat16"),
        )
    )
