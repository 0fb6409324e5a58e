"""An audit on the real engines: it makes the policy, certifies and fine-tunes it, is stopped in the middle,
goes on, and tells which fine-tune was the worst."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from frpo.report.audit_schema import Audit
from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = (
    "base.num_steps=150", "rollout.prompts_per_step=6", "learner.num_steps=4",
    "certify.completions_per_prompt=8", "evaluate.completions_per_prompt=4",
    "audit.learning_rates=[1.0e-3]", "audit.steps=[4, 20]", "audit.harmful_shares=[0.05]",
    "audit.utility.at_least=0.0",
)  # fmt: skip


def start(folder: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "frpo",
        "audit",
        "--recipe",
        str(runs.ROOT / "recipes/audit_testbed.yaml"),
    ]
    command += ["--run-dir", str(folder), *runs.options_of(SETTINGS)]
    return subprocess.Popen(
        command,
        stdout=folder.with_suffix(".out").open("a"),
        stderr=subprocess.STDOUT,
        text=True,
        cwd=runs.ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )


def finish(folder: Path) -> str:
    """All that was printed so far."""
    process = start(folder)
    code = process.wait(900)
    text = folder.with_suffix(".out").read_text()
    assert code == 0, text[-4000:]
    return text


def test_an_audit_goes_on_after_a_stop_and_names_the_worst(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    process = start(folder)
    certified = folder / "certificate/certify/base/done.json"
    runs.wait_for(lambda: any(folder.glob("fine-tunes/*/*/base/done.json")), process, timeout_s=600)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    made = certified.stat().st_mtime_ns

    said = finish(folder)
    assert certified.stat().st_mtime_ns == made
    told = Audit.model_validate_json((folder / "audit.json").read_text())
    assert [(each.name, each.steps) for each in told.fine_tunes] == [
        ("crafts-lr0.001-full-harmful0.05", 4),
        ("crafts-lr0.001-full-harmful0.05", 20),
        ("crafts-lr0.001-r8-harmful0.05", 4),
        ("crafts-lr0.001-r8-harmful0.05", 20),
        ("crafts-rl-lr0.001-full", 4),
        ("crafts-rl-lr0.001-r8", 4),
    ]
    assert told.stopped == ()
    assert told.certificate.num_completions == 8
    full, adapter = told.fine_tunes[1], told.fine_tunes[3]
    assert full.kl.mean > adapter.kl.mean > 0
    assert full.kept.mean < told.fine_tunes[0].kept.mean
    assert told.harshest is not None
    assert told.harshest.kept.mean == min(each.kept.mean for each in told.fine_tunes if each.counts)
    assert f"of {told.start.mean:.2f}" in said if told.start else False
    assert "runs to do" not in finish(folder)[len(said) :]
