"""Supervised fine-tuning as a stage does it, with fake ranks: what must stop it, and what is kept then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from frpo.config import BaseConfig
from frpo.metrics import RunLog
from frpo.outline.base import Base
from frpo.outline.stage import Data, Supervised
from frpo.prompts import Examples
from frpo.roles import WorkerFailed
from frpo.rows import read_rows
from frpo.stages.work import Work
from frpo.stats import FinetuneStats
from frpo.stops import RunStopped, stop_if_finetune_is_broken
from frpo.types import Anchor, Sequences, Written
from tests.support.fakes import Now, config, team


class FakeRanks:
    """Gives a loss and a gradient norm for each update; implements what a stage asks of
    actors.finetune.FinetunePool."""

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

    def update(self, sequences: Sequences, anchor: Anchor | None = None) -> FinetuneStats:
        loss, norm = self.stats[self.done]
        self.done += 1
        return FinetuneStats(loss, norm, 1e-3, len(sequences), 0.1)

    def export(self, folder: Path, *, merged: bool) -> None:
        folder.mkdir()

    def stop(self) -> None: ...


class DyingRanks(FakeRanks):
    """Write each checkpoint when they are waited for, and die in the third update."""

    def save(self, folder: Path) -> Any:
        super().save(folder)
        return self

    def ready(self) -> bool:
        return False

    def result(self, limit_s: float | None = None) -> list[Written]:
        if self.done == 3:
            raise WorkerFailed("fine-tune worker 0 did not finish writing a checkpoint")
        return []

    def update(self, sequences: Sequences, anchor: Anchor | None = None) -> FinetuneStats:
        stats = super().update(sequences)
        if self.done == 3:
            raise WorkerFailed("fine-tune worker 0 died during update()")
        return stats


def finetune(run: Path, stats: list[tuple[float, float]], kind: type[FakeRanks] = FakeRanks) -> FakeRanks:
    """A base stage without its measurement."""
    cfg = config().model_copy(update={"run_dir": run})
    cfg = cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"every": 1})})
    ranks = kind(stats)
    examples = Examples(((np.array([1], np.int32), np.array([2], np.int32)),) * 4, ("t",) * 4)
    inputs: Any = SimpleNamespace(examples=lambda data: examples)
    settings = BaseConfig(num_steps=len(stats), batch_size=2, data=())
    with RunLog(run, cfg) as log:
        work = Work(cfg, replace(team(cfg, ()), finetune=ranks), log, inputs)
        list(work.finetune(Base(settings), Supervised(settings, Data("base.data", (), 8)), []))
    return ranks


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            (float("nan"), 1.0),
            r"step 3: the loss is nan: this update broke the policy, "
            r"and nothing of it is kept; lower learning_rate",
        ),
        ((float("inf"), 1.0), r"step 3: the loss is inf"),
        (
            (1.0, float("nan")),
            r"step 3: the gradient norm is nan: .* lower learning_rate \(here 0.001\) or grad_clip",
        ),
    ],
)
def test_a_number_that_is_none_stops_it_before_the_checkpoint(
    broken: tuple[float, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunStopped, match=message):
        finetune(tmp_path, [(1.0, 1.0), (0.9, 1.0), broken, (0.8, 1.0)])
    assert sorted(p.name for p in (tmp_path / "base" / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    assert not (tmp_path / "base" / "policy").exists()
    mended = finetune(
        tmp_path, [(1.0, 1.0), (0.9, 1.0), (0.85, 1.0), (0.8, 1.0)]
    )  # goes on after the last good step
    assert mended.done == 4
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "base" / "policy").is_dir()


def test_so_does_a_kl_that_is_none_where_there_is_one() -> None:
    stats = FinetuneStats(loss=1.0, grad_norm=0.5, learning_rate=1e-3, num_tokens=4, seconds=0.1)
    stop_if_finetune_is_broken(stats, 3)
    with pytest.raises(RunStopped, match=r"^step 3: the KL is nan: this update broke the policy"):
        stop_if_finetune_is_broken(replace(stats, kl=float("nan")), 3)


def test_a_rank_that_dies_while_it_writes_costs_that_checkpoint_alone_and_is_named_once(
    tmp_path: Path,
) -> None:
    """The last before it is finished when the next begins, and the failed run does not wait long for what
    cannot come."""
    with pytest.raises(WorkerFailed, match=r"died during update\(\)"):
        finetune(tmp_path, [(1.0, 1.0)] * 5, DyingRanks)
    steps = sorted(p.name for p in (tmp_path / "base" / "checkpoints").iterdir())
    assert steps == [".tmp-00000002", "step-00000001"]
    mended = finetune(tmp_path, [(1.0, 1.0), (0.9, 1.0), (0.8, 1.0)])
    assert mended.done == 3
    assert not list((tmp_path / "base").glob("checkpoints/.tmp-*"))
