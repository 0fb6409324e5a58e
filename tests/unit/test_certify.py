"""What `frpo certify` makes of its options, what its digest covers, and the check that the engine runs the
policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from frpo.certify import (
    Drawing,
    in_options,
    make_configuration,
    parse_pairs,
    parse_reward,
    refuse_other_policy,
)
from frpo.config import CertifyConfig, Config, ConfigError, DatasetConfig, FunctionReward, ModelReward
from frpo.disk import sha256_of_folder
from frpo.saved import weights_sha256
from frpo.stops import RunStopped
from frpo.types import Floats, Group
from tests.support.fakes import ANSWERS, FakeEngine, FakePrompts, Now, completion_logprobs


def config() -> Config:
    rows, reward = (
        DatasetConfig(path="rows.jsonl", task="prompts"),
        FunctionReward(kind="function", name="reward", function="m:f"),
    )
    drawing = Drawing(max_prompt_tokens=2, max_new_tokens=1, seed=0, out=Path("out"))
    return make_configuration("model", rows, reward, CertifyConfig(), drawing)


class FakeScorer:
    """transformers' log-probs of a policy with these logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def submit(self, policy: Path, groups: list[Group]) -> Now:
        logp = torch.log_softmax(self.logits, 0).numpy()
        return Now([tuple(logp[c.token_ids] for c in g.completions) for g in groups])


class TwoEngines(FakeEngine):
    """The second is off by `gap` on every token."""

    gap = 0.0

    def logprobs(self, sequences):  # type: ignore[no-untyped-def]
        first = completion_logprobs(self.logits, sequences)
        second: Floats = first.copy()
        second += self.gap
        return np.stack([first, second])


@pytest.mark.parametrize("gap", [0.0, 0.02, float("nan")])
def test_an_engine_that_runs_another_policy_is_caught(gap: float) -> None:
    engine, prompts = TwoEngines(), FakePrompts(5).take(0)
    engine.version, engine.gap, engine.logits = 0, gap, torch.arange(ANSWERS).float()
    scorer = FakeScorer(torch.arange(ANSWERS).float())
    if gap == 0:
        refuse_other_policy(engine, scorer, Path("policy"), prompts, config())
    else:
        with pytest.raises(
            RunStopped,
            match=r"differ by (0\.02|nan) nats a token of policy \(rollout\.parity_tolerance = 0\.001\)",
        ):
            refuse_other_policy(engine, scorer, Path("policy"), prompts, config())


def test_what_is_compared_is_what_each_says_of_the_same_tokens() -> None:
    engine, scorer = TwoEngines(), FakeScorer(torch.zeros(ANSWERS))
    engine.version, engine.logits = 0, torch.arange(ANSWERS).float()
    with pytest.raises(RunStopped):
        refuse_other_policy(engine, scorer, Path("policy"), FakePrompts(5).take(0), config())


def test_the_digest_covers_the_adapter_how_it_is_applied_and_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, name in ((base, "model"), (adapter, "adapter_model")):
        (folder / "checkpoint-5").mkdir(parents=True)
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    settings = {"base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8, "inference_mode": True}

    def digest(**changed: object) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        return weights_sha256(adapter)

    first = digest()
    assert weights_sha256(base) == sha256_of_folder(base)
    (base / "checkpoint-5" / "model.safetensors").write_bytes(b"a trainer's")
    moved = base.rename(tmp_path / "moved")
    assert digest(base_model_name_or_path=str(moved), inference_mode=False) == first
    assert digest(base_model_name_or_path=str(moved), lora_alpha=16) != first
    (moved / "model.safetensors").write_bytes(b"another")
    assert digest(base_model_name_or_path=str(moved)) != first


def test_arguments_are_yaml_and_a_model_is_told_from_a_function(tmp_path: Path) -> None:
    given = ("a=1", "b=[x, 2]", "c={d: true}", "e=x=", "f=", "g=a=b")
    reward = parse_reward("file.py:f", given)
    assert isinstance(reward, FunctionReward)
    assert reward.arguments == {"a": 1, "b": ["x", 2], "c": {"d": True}, "e": "x=", "f": None, "g": "a=b"}
    assert isinstance(parse_reward(str(tmp_path), ()), ModelReward)
    assert isinstance(parse_reward("org/judge", ()), ModelReward)
    assert isinstance(parse_reward("rewards/mine.py:f", ()), FunctionReward)
    assert parse_pairs("--where", ("column=a b", "other=")) == {"column": "a b", "other": ""}


def test_mistakes_name_the_options_and_nothing_else() -> None:
    text = (
        "data.max_prompt_tokens + rollout.max_new_tokens: 9 + 9 do not fit /a/model.path: lower\n"
        "radii.2: no\n"
        "floor: is /floor: x\n"
        "other: floor"
    )
    right = (
        "--max-prompt-tokens + --max-new-tokens: 9 + 9 do not fit /a/model.path: lower\n"
        "--radius.2: no\n"
        "--floor: is /floor: x\n"
        "other: floor"
    )
    assert str(in_options(ConfigError(text))) == right


def test_radii_are_in_order() -> None:
    assert CertifyConfig(radii=(2.0, 0.5)).radii == (0.5, 2.0)
