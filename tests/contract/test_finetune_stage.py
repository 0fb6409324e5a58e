"""Supervised fine-tuning as a stage does it, with fake ranks: what must stop it, and what is kept then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from frpo.config import FinetuneConfig
from frpo.metrics import RunLog
from frpo.outline import outline
from frpo.prompts import Examples
from frpo.rows import read_rows
from frpo.stages.work import Work
from frpo.stops import RunStopped
from frpo.types import FinetuneStats, Sequences
from tests.contract.fakes import Now, config


class FakeRanks:
    """Gives a loss and a gradient norm for each update; implements what a stage asks of actors.finetune.FinetunePool."""

    def __init__(self, stats: list[tuple[float, float]]) -> None:
        self.stats, self.done = stats, 0

    def start(self, policy: Path, *settings: object) -> None:
        self.done = 0

    def load(self, folder: Path) -> None:
        self.done = int((folder / "done").read_text())

    def save(self, folder: Path) -> Now:
        folder.mkdir(parents=True)
        (folder / "done").write_text(str(self.done))
        return Now([])

    def update(self, sequences: Sequences) -> FinetuneStats:
        loss, norm = self.stats[self.done]
        self.done += 1
        return FinetuneStats(loss, norm, 1e-3, len(sequences), 0.1)

    def export(self, folder: Path, *, merged: bool) -> None:
        folder.mkdir()

    def stop(self) -> None: ...


def finetune(run: Path, stats: list[tuple[float, float]]) -> FakeRanks:
    cfg = config().model_copy(update={"run_dir": run})
    cfg = cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"every": 1})})
    ranks, team = FakeRanks(stats), SimpleNamespace()
    team.finetune = ranks
    examples = Examples(((np.array([1], np.int32), np.array([2], np.int32)),) * 4)
    with RunLog(run, cfg) as log:
        inputs: Any = None
        work = Work(cfg, team, log, inputs)  # type: ignore[arg-type]
        spec = FinetuneConfig(num_steps=len(stats), batch_size=2)
        list(work.finetune(outline(cfg)[0], run / "base", Path("policy"), spec, examples, ()))
    return ranks


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ((float("nan"), 1.0), r"step 3: the loss is nan: this update broke the policy, and nothing of it is kept; lower learning_rate"),
        ((float("inf"), 1.0), r"step 3: the loss is inf"),
        ((1.0, float("nan")), r"step 3: the gradient norm is nan: .* lower learning_rate \(here 0.001\) or grad_clip"),
    ],
)
def test_a_number_that_is_none_stops_it_before_the_checkpoint(broken: tuple[float, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=message):
        finetune(tmp_path, [(1.0, 1.0), (0.9, 1.0), broken, (0.8, 1.0)])
    assert sorted(p.name for p in (tmp_path / "base" / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    assert not (tmp_path / "base" / "policy").exists()
    mended = finetune(tmp_path, [(1.0, 1.0), (0.9, 1.0), (0.85, 1.0), (0.8, 1.0)])  # goes on after the last good step
    assert mended.done == 4
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "base" / "policy").is_dir()
