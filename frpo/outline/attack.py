"""The stage that looks for the worst fine-tune inside a ball around an arm's policy: reward -r, and a penalty
steered to end at the radius."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from frpo.config import ArmConfig, AttackConfig, Config, GrpoEstimator, ObjectiveConfig
from frpo.outline.stage import Heldout, Loop, Stage, Subject, Training, Workbench
from frpo.records import Evaluation, StageResult


@dataclass(frozen=True)
class Attack(Stage):
    arm: ArmConfig
    settings: AttackConfig
    radius: float
    """nats per completion"""

    @property
    def name(self) -> str:
        return f"attack/{self.arm.name}/{self.radius:g}"

    @property
    def stands_on(self) -> str:
        return f"rlhf/{self.arm.name}"

    def values(self) -> Mapping[str, JsonValue]:
        return {"attack.radii": self.radius}

    @property
    def attacker(self) -> ArmConfig:
        """What trains it: the arm's learner by GRPO."""
        objective = ObjectiveConfig(
            estimator=GrpoEstimator(), beta=0.3, penalty="reverse", target_kl=self.radius, aggregation="sum"
        )
        asked = {"num_steps": self.settings.num_steps, "stop_at_reward": None}
        learner = self.arm.learner.model_copy(update=asked)
        return ArmConfig(name=f"attack-{self.radius:g}", objective=objective, learner=learner)

    def training(self) -> Training:
        field = f"arms.{self.arm.name}.learner"
        attacker = self.attacker
        return Training(field, attacker.learner, self.settings.num_steps, attacker.objective)

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        return heldout.evaluated(config, times=len({self.settings.num_steps // 2, self.settings.num_steps}))

    def do(self, work: Workbench) -> StageResult:
        kept: list[Evaluation] = []
        subject = Subject(self.arm.name, f"attack {self.radius:g}", work.policy_of(self.stands_on))
        mix = self.settings.mix or work.config.data.mix
        loop = Loop(self.attacker, work.train_prompts, mix, worst=True)
        for pause in work.run_loop(self, loop, kept):
            if pause.last or pause.step == self.settings.num_steps // 2:
                kept.append(work.measure(self, pause.step, subject))
        return StageResult(stage=self.name, evaluations=tuple(kept))
