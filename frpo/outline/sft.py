"""The stage that fine-tunes an arm's policy on examples, and measures what it forgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frpo.config import DownstreamSft
from frpo.outline.downstream import DownstreamStage
from frpo.outline.stage import Data, Subject, Supervised, Training, Workbench
from frpo.records import Evaluation, Interpolation, StageResult


@dataclass(frozen=True)
class Sft(DownstreamStage):
    task: DownstreamSft

    @property
    def heldout(self) -> Data:
        return Data(f"{self.field}.heldout", self.task.heldout, self.task.max_tokens)

    def data(self) -> Sequence[Data]:
        examples = Data(f"{self.field}.data", self.task.data, self.task.max_tokens)
        return (examples, self.heldout) if self.task.heldout else (examples,)

    def training(self) -> Training:
        return Training(self.field, self.task, self.task.num_steps)

    def do(self, work: Workbench) -> StageResult:
        kept: list[Evaluation] = []
        before = work.policy_of(self.stands_on)
        interpolation: Interpolation | None = None
        finetune = Supervised(
            self.task, self.data()[0], (0, *self.task.marks), mix=self.task.mix, heldout=self.heldout
        )
        for pause in work.finetune(self, finetune, kept):
            work.publish_finetune(pause.step)
            subject = Subject(self.arm.name, self.task.name, before, work.heldout_loss(self.heldout))
            kept.append(work.measure(self, pause.step, subject))
            interpolation = pause.interpolation
        return StageResult(stage=self.name, evaluations=tuple(kept), interpolation=interpolation)
