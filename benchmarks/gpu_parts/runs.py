"""Whole runs of `frpo run`, all roles on one card."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpu_parts.card import has_card, time_call
from gpu_parts.model import RANK, SIZES

SHORT = (
    "base.num_steps=60",
    "rollout.prompts_per_step=6",
    "learner.num_steps=6",
    "checkpoint.every=2",
    "evaluate.completions_per_prompt=2",
    "evaluate.validate_every=4",
    "rollout.parity_every=3",
    "arms=[{name: frpo, objective: {estimator: {lam: 0.5}, beta: 0.3, penalty: k3}}]",
    "downstream=[]",
)
SHARED = (
    "rollout.num_gpus=1",
    "rollout.sleep=true",
    "rollout.gpu_memory_utilization=0.5",
    "rollout.enforce_eager=true",
    "learner.num_gpus=1",
    "reference.num_gpus=1",
    "evaluate.num_gpus=1",
)
"""Settings of roles that take turns on one card."""
EVEN = r"w\d*[02468](\D.*)?"
"""Half of all completions begin so."""
FIELDS = (
    "generate_s",
    "score_s",
    "update_s",
    "publish_s",
    "step_s",
    "mismatch_kl",
    "kl",
    "reward",
    "grad_norm",
    "published_bytes",
    "num_tokens",
)
"""Of a step, kept."""


def run_full(work: Path, size: str) -> dict[str, Any]:
    """The testbed, all weights in float32."""
    return _run_whole(Path("recipes/testbed.yaml"), work / "full", (*SHORT, *_settings_of_card()))


def run_adapter(work: Path, size: str) -> dict[str, Any]:
    """Random weights in bfloat16 with an adapter, as large as the card's user would take."""
    prompts = work / "prompts.jsonl"
    _write_prompts(prompts, SIZES[size]["vocab_size"])
    recipe = work / "adapter.yaml"
    recipe.write_text(json.dumps(_adapter_recipe(work / "model", prompts)))
    return _run_whole(recipe, work / "adapter", _settings_of_card())


def _settings_of_card() -> tuple[str, ...]:
    return SHARED if has_card() else ()


def _run_whole(recipe: Path, folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    from frpo.metrics import numbers_of, read_steps

    sets = itertools.chain.from_iterable(("--set", setting) for setting in settings)
    command = [sys.executable, "-m", "frpo", "run", str(recipe), "--run-dir", str(folder), *sets]
    seconds, _ = time_call(lambda: subprocess.run(command, check=True))
    steps = []
    for row in read_steps(folder, "rlhf/frpo"):
        numbers = numbers_of(row)
        steps.append({field: numbers.get(field) for field in FIELDS})
    return {"seconds": round(seconds, 1), "steps": steps}


def _write_prompts(file: Path, vocabulary: int) -> None:
    rng = np.random.default_rng(1)
    with file.open("w") as lines:
        for _ in range(96):
            prompt = " ".join(map(str, rng.integers(0, vocabulary, 8)))
            lines.write(json.dumps({"prompt": prompt, "task": "even"}) + "\n")


def _adapter_recipe(model: Path, prompts: Path) -> dict[str, Any]:
    new, groups = (128, 16) if has_card() else (8, 4)
    data = {"path": str(prompts), "task_column": "task", "heldout_share": 0.2}
    reward = {
        "kind": "function",
        "name": "even",
        "function": "frpo.rewards:format_regex",
        "arguments": {"pattern": EVEN},
    }
    return {
        "name": "adapter",
        "model": {"path": str(model), "dtype": "bfloat16", "lora": {"rank": RANK, "alpha": RANK}},
        "data": {
            "train": [data | {"part": "train"}],
            "heldout": [data | {"part": "heldout"}],
            "max_prompt_tokens": 64,
        },
        "rewards": [reward],
        "rollout": {
            "prompts_per_step": groups,
            "group_size": 8,
            "max_new_tokens": new,
            "max_num_seqs": 128,
            "parity_every": 2,
        },
        "objective": {"estimator": {"lam": 0.5}, "beta": 0.02, "penalty": "reverse"},
        "learner": {"num_steps": 4, "learning_rate": 1e-3, "micro_batch_tokens": 16384},
        "arms": [{"name": "frpo", "objective": {}}],
        "evaluate": {"completions_per_prompt": 2, "max_prompts": 8, "validate_every": 100},
        "checkpoint": {"every": 2},
    }
