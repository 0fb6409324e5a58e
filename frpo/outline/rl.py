"""The stage that fine-tunes an arm's policy by the loop, on other prompts, and measures what it forgets."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from frpo.config import ArmConfig, DownstreamRl
from frpo.outline.downstream import DownstreamStage
from frpo.outline.stage import BASE, Data, Loop, Subject, Training, Workbench
from frpo.records import Evaluation, StageResult


@dataclass(frozen=True)
class Rl(DownstreamStage):
    task: DownstreamRl

    @property
    def redone_as(self) -> Set[str]:
        """On the base itself, no rlhf stage below it counts what the loop draws with."""
        return {self.kind, "rlhf"} if self.stands_on == BASE else {self.kind}

    def data(self) -> Sequence[Data]:
        return (Data(f"{self.field}.data", self.task.data),)

    def training(self) -> Training:
        learner = self.task.learner
        return Training(f"{self.field}.learner", learner, learner.num_steps, self.task.objective)

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
