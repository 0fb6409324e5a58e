"""The stage that trains an arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from frpo.config import ArmConfig, Config, Section
from frpo.outline.stage import Heldout, Loop, Stage, Subject, Training, Workbench
from frpo.records import Evaluation, StageResult


@dataclass(frozen=True)
class Rlhf(Stage):
    arm: ArmConfig

    @property
    def name(self) -> str:
        return f"rlhf/{self.arm.name}"

    @property
    def stands_on(self) -> str:
        return "base"

    def sections(self) -> Mapping[str, Section]:
        return {f"arms.{self.arm.name}": self.arm}

    def training(self) -> Training:
        learner = self.arm.learner
        return Training(f"arms.{self.arm.name}.learner", learner, learner.num_steps, self.arm.objective)

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        evaluate = config.evaluate
        validations = (self.arm.learner.num_steps - 1) // evaluate.validate_every
        return (
            heldout.evaluated(config, times=1) + heldout.prompts * validations * evaluate.validate_completions
        )

    def do(self, work: Workbench) -> StageResult:
        kept: list[Evaluation] = []
        subject = Subject(self.arm.name)
        for pause in work.run_loop(self, Loop(self.arm, work.train_prompts, work.config.data.mix), kept):
            if pause.last:
                kept.append(work.measure(self, pause.step, subject))
            elif work.has_heldout and is_due(pause.step, work.config.evaluate.validate_every):
                kept.append(work.validate(self, pause.step, subject))
        summary = work.summarize(self, self.arm.name)
        return StageResult(stage=self.name, evaluations=(kept[-1],), arm=summary)


def is_due(step: int, every: int) -> bool:
    return step > 0 and step % every == 0
