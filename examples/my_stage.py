"""The stage that trains an arm's policy on, with that policy as the reference."""

from __future__ import annotations

from dataclasses import dataclass

from frpo.config import ArmConfig, Config
from frpo.outline.stage import Heldout, Loop, Stage, Subject, Training, Workbench
from frpo.records import Evaluation, StageResult


@dataclass(frozen=True)
class Second(Stage):
    arm: ArmConfig
    num_steps: int

    @property
    def name(self) -> str:
        return f"second/{self.arm.name}"

    @property
    def stands_on(self) -> str:
        return f"rlhf/{self.arm.name}"

    @property
    def spec(self) -> ArmConfig:
        learner = self.arm.learner.model_copy(update={"num_steps": self.num_steps})
        return self.arm.model_copy(update={"learner": learner})

    def training(self) -> Training:
        field = f"arms.{self.arm.name}.learner"
        return Training(field, self.spec.learner, self.num_steps, self.spec.objective)

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        return heldout.evaluated(config, times=1)

    def do(self, work: Workbench) -> StageResult:
        kept: list[Evaluation] = []
        subject = Subject(self.arm.name, "second round", work.policy_of(self.stands_on))
        loop = Loop(self.spec, work.train_prompts, work.config.data.mix)
        for pause in work.run_loop(self, loop, kept):
            if pause.last:
                kept.append(work.measure(self, pause.step, subject))
        return StageResult(stage=self.name, evaluations=tuple(kept))
