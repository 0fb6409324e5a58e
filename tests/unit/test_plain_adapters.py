"""LoRA adapters that stay beside the weights: which may, and that nothing of them is lost there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig
from safetensors.torch import load_file, save_file

from frpo import policies, saved
from tests.support.policies import lora, write_adapter, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


def test_beside_bfloat16_weights_a_small_adapter_is_kept_whole(tmp_path: Path) -> None:
    """Its change is less than half a step of every weight: merged, nothing of it is left."""
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base, lora(r=4, lora_alpha=4), dtype=torch.bfloat16)
    weights = load_file(adapter / saved.WEIGHTS)
    save_file(
        {n: t * 1e-4 if "lora_B" in n else t for n, t in weights.items()},
        adapter / saved.WEIGHTS,
        metadata={"format": "pt"},
    )
    merged, plain = (dict(policies.read_weights(f, "bfloat16")) for f in (adapter, base))
    moved = sum(int((merged[n] != plain[n]).sum()) for n in plain) / sum(t.numel() for t in plain.values())
    assert moved < 0.05
    policy = policies.load_beside(adapter, dtype="bfloat16")
    held = {
        n.replace(".default", "").removeprefix("base_model.model."): p
        for n, p in policy.named_parameters()
        if "lora_" in n
    }
    expected = {n.removeprefix("base_model.model."): t for n, t in load_file(adapter / saved.WEIGHTS).items()}
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[n], t) for n, t in expected.items())
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert type(policies.load_beside(adapter, dtype="float32")) is type(
        policies.read_policy(adapter, dtype="float32")
    )


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"r": 4}, 4), ({"r": 4, "rank_pattern": {"q_proj": 9}}, 9), ({"use_rslora": True, "r": 8}, 8),
        ({"use_dora": True}, None),
        ({"bias": "lora_only"}, None), ({"modules_to_save": ["lm_head"]}, None),
        ({"init_lora_weights": "pissa"}, None),
        ({"target_modules": ["q_proj", "lm_head"]}, None), ({"lora_bias": True}, None),
        ({"trainable_token_indices": [3]}, None),
    ],
)  # fmt: skip
def test_a_plain_adapter_is_two_matrices_on_linear_layers(
    settings: dict[str, Any], rank: int | None, base: Path, tmp_path: Path
) -> None:
    assert saved.plain_rank(write_adapter(tmp_path / "adapter", base, lora(**settings))) == rank


def test_another_kind_than_lora_is_not_plain(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", base, LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert saved.plain_rank(adapter) is None
