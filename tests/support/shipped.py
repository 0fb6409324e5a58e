"""A finished run, done with fakes, whose arm's policy is a real one: what is shipped of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frpo.disk import sha256_of_folder, write_text
from frpo.records import StageResult
from frpo.report.card import policy_of
from frpo.report.data import collect_report
from frpo.report.schema import Report
from frpo.rundir import write_description
from tests.support.whole import configured, run

TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "."}'}


def do_run(folder: Path, **changed: Any) -> Path:
    """Every stage but benchmarks and attacks, without a report."""
    config = configured(folder, **{"harness": None, "attack": None, **changed})
    run(config)
    write_description(folder, config)
    return folder


def put_policy(folder: Path, write: Callable[[Path], object] | None = None) -> Report:
    """Put a policy in the place of the fakes', as if the run had trained it, and write report.json."""
    from tests.support.policies import write_base  # imports transformers and peft

    policy = policy_of(folder, "arm")
    (write or write_base)(policy)
    for name, content in TOKENIZER.items():
        (policy / name).write_text(content)
    (policy / "logits.npy").touch()
    done = policy.with_name("done.json")
    result = StageResult.model_validate_json(done.read_text())
    assert result.arm is not None
    arm = result.arm.model_copy(update={"weights_sha256": sha256_of_folder(policy)})
    done.write_text(result.model_copy(update={"arm": arm}).model_dump_json())
    report = collect_report(folder)
    write_text(folder / "report.json", report.model_dump_json())
    return report


def point_adapter_at(policy: Path, base: str) -> None:
    """Another place of the model that an adapter stands on."""
    file = policy / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": base}))
