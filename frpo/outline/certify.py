"""The stage that certifies an arm's policy on the held-out prompts of the tasks that it was trained for."""

from __future__ import annotations

from dataclasses import dataclass

from frpo.config import ArmConfig, Config
from frpo.outline.stage import Heldout, Stage, Workbench, maker_of
from frpo.records import StageResult


@dataclass(frozen=True)
class Certify(Stage):
    arm: ArmConfig

    @property
    def name(self) -> str:
        return f"certify/{self.arm.name}"

    @property
    def stands_on(self) -> str:
        return maker_of(self.arm)

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        assert config.certify is not None
        return heldout.trained * config.certify.completions_per_prompt

    def do(self, work: Workbench) -> StageResult:
        work.load_policy(work.policy_of(self.stands_on))
        return StageResult(stage=self.name, evaluations=(), certificates=work.certify(self, self.arm))
