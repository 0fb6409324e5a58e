"""FRPO inside TRL's GRPOTrainer, on the testbed's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from frpo import testbed

K, PROMPTS = 4, 4


def make(model: Path, out: Path, reward: Any, settings: dict[str, Any], **args: Any) -> Any:
    import datasets
    from transformers import AutoTokenizer

    from frpo.integrations.trl import FrpoSettings, FRPOTrainer

    data = datasets.Dataset.from_list(
        [{"prompt": i.prompt, "answer": list(i.answer)} for i in list(testbed.harmless_items())[:64]]
    )
    options: dict[str, Any] = {
        "per_device_train_batch_size": K * PROMPTS,
        "num_generations": K,
        "max_completion_length": 7,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
    } | args
    return FRPOTrainer(
        str(model),
        reward,
        args=trl.GRPOConfig(output_dir=str(out), **options),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
        frpo=FrpoSettings(**settings),
    )
