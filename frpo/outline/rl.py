"""The stage that fine-tunes an arm's policy by the loop, on other prompts, and measures what it forgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frpo.config import ArmConfig, Config, DownstreamRl, Section
from frpo.outline.stage import Data, Heldout, Loop, Stage, Subject, Training, Workbench
from frpo.records import Evaluation, StageResult


@dataclass(frozen=True)
class Rl(Stage):
    arm: ArmConfig
    task: DownstreamRl

    @property
    def name(self) -> str:
        return f"downstream/{self.arm.name}/{self.task.name}"

    @property
    def stands_on(self) -> str:
        return f"rlhf/{self.arm.name}"

    def sections(self) -> Mapping[str, Section]:
        return {f"downstream.{self.task.name}": self.task}

    def data(self) -> Sequence[Data]:
        return (Data(f"downstream.{self.task.name}.data", self.task.data),)

    def training(self) -> Training:
        learner = self.task.learner
        return Training(
            f"downstream.{self.task.name}.learner", learner, learner.num_steps, self.task.objective
        )

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        return heldout.evaluated(config, times=len({0, *self.task.marks, self.task.num_steps}))

    def do(self, work: Workbench) -> StageResult:
        kept: list[Evaluation] = []
        subject = Subject(self.arm.name, self.task.name, work.policy_of(self.stands_on))
        spec = ArmConfig(name=self.task.name, objective=self.task.objective, learner=self.task.learner)
        marks = {0, *self.task.marks}
        for pause in work.run_loop(self, Loop(spec, work.read_prompts(self.data()[0])), kept):
            if pause.last or pause.step in marks:
                kept.append(work.measure(self, pause.step, subject))
        asked = marks | {kept[-1].step}  # not the end of fewer steps, from which it went on
        return StageResult(stage=self.name, evaluations=tuple(e for e in kept if e.step in asked))
