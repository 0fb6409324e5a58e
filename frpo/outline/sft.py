"""The stage that fine-tunes an arm's policy on examples, and measures what it forgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frpo.config import ArmConfig, Config, DownstreamSft, Section
from frpo.outline.stage import Data, Finetune, Heldout, Stage, Subject, Training, Workbench
from frpo.records import Evaluation, StageResult


@dataclass(frozen=True)
class Sft(Stage):
    arm: ArmConfig
    task: DownstreamSft

    @property
    def name(self) -> str:
        return f"downstream/{self.arm.name}/{self.task.name}"

    @property
    def stands_on(self) -> str:
        return f"rlhf/{self.arm.name}"

    def sections(self) -> Mapping[str, Section]:
        return {f"downstream.{self.task.name}": self.task}

    @property
    def heldout(self) -> Data:
        return Data(f"downstream.{self.task.name}.heldout", self.task.heldout, self.task.max_tokens)

    def data(self) -> Sequence[Data]:
        examples = Data(f"downstream.{self.task.name}.data", self.task.data, self.task.max_tokens)
        return (examples, self.heldout) if self.task.heldout else (examples,)

    def training(self) -> Training:
        return Training(f"downstream.{self.task.name}", self.task, self.task.num_steps)

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        return heldout.evaluated(config, times=len({0, *self.task.marks, self.task.num_steps}))

    def do(self, work: Workbench) -> StageResult:
        kept: list[Evaluation] = []
        before = work.policy_of(self.stands_on)
        finetune = Finetune(self.task, self.data()[0], (0, *self.task.marks))
        for pause in work.finetune(self, finetune, kept):
            work.publish_finetune(pause.step)
            subject = Subject(self.arm.name, self.task.name, before, work.heldout_loss(self.heldout))
            kept.append(work.measure(self, pause.step, subject))
        return StageResult(stage=self.name, evaluations=tuple(kept))
