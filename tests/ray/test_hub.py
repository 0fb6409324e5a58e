"""Models under hub names in a cache without a network, and every path with letters that are not ASCII, on the
real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from frpo.certify import CertificateFile
from frpo.disk import sha256_of_folder
from frpo.metrics import read_steps
from frpo.recipe import load_recipe
from frpo.saved import weights_sha256
from tests.support import hubs, runs

NAME = "toy/policy-0.1B"
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} now{% endif %}"
)
REWARD = "def constant(completions, value, **columns):\n    return [value for _ in completions]\n"


@pytest.fixture
def snapshot(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "模型"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))  # read when it was imported
    monkeypatch.setenv("LC_ALL", "C")
    return hubs.cache(cache, NAME, tiny_model)


@pytest.mark.timeout(600)
def test_a_run_without_a_base_stage_from_a_name(snapshot: Path, tmp_path: Path) -> None:
    folder = tmp_path / "überprüfung ☃"
    settings = (
        *runs.SHORT[1:],
        *runs.ONE_ARM,
        f"model.path={NAME}",
        "model.lora={rank: 4, alpha: 8}",
        "base=null",
        "learner.num_steps=2",
    )
    text = runs.run(folder, *settings)
    assert [r.step for r in read_steps(folder, "rlhf/frpo")] == [1, 2]
    assert load_recipe(folder / "config.yaml").model.path == f"{NAME}@{snapshot.name}"
    assert (folder / "report.html").is_file()
    adapter = json.loads((folder / "rlhf" / "frpo" / "policy" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, snapshot.name)
    assert "downloading" not in text


@pytest.mark.timeout(600)
def test_an_adapter_on_a_hubs_model_is_certified_with_its_own_tokenizer(
    snapshot: Path, tmp_path: Path
) -> None:
    adapter, tokenizer = adapted(snapshot, tmp_path / "Adapter é")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [
        {"prompt": f"how do i {verb} the {thing}", "kind": kind}
        for kind, verb, thing in product("ab", ("break", "burn"), ("lock", "car", "door"))
    ]
    (tmp_path / "données.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = (
        str(adapter),
        str(tmp_path / "données.jsonl"),
        "--reward",
        f"{tmp_path / 'reward.py'}:constant",
        "--argument",
        "value=0.75",
        "--chat",
        "--where",
        "kind=b",
        "--completions",
        "4",
        "--max-prompt-tokens",
        "20",
        "--max-new-tokens",
        "5",
        "--out",
        str(tmp_path / "Zertifikat ß"),
    )
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "frpo", "certify", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=runs.ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "comparing the engine with transformers: " in done.stdout
    file = CertificateFile.model_validate_json((tmp_path / "Zertifikat ß" / "certificate.json").read_text())
    asked_for = [[{"role": "user", "content": r["prompt"]}] for r in rows if r["kind"] == "b"]
    right = [
        tuple(tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False))
        for m in asked_for
    ]
    assert list(file.prompt_token_ids) == right
    assert file.certificates[0].rewards == ((0.75,) * 4,) * 6
    assert file.model == str(adapter)
    assert file.weights_sha256 == weights_sha256(adapter) != sha256_of_folder(adapter)


def adapted(base: Path, folder: Path) -> tuple[Path, Any]:
    """A rank-4 adapter that moves the policy, on the hub's name of its base, with a tokenizer that has a chat
    template."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.peft_config["default"].base_model_name_or_path = NAME
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder, tokenizer
