"""What every stage that fine-tunes an arm's policy has in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from frpo.config import ArmConfig, Config, DownstreamConfig, Section
from frpo.outline.stage import Heldout, Stage, maker_of


@dataclass(frozen=True)
class DownstreamStage(Stage):
    arm: ArmConfig
    task: DownstreamConfig

    @property
    def name(self) -> str:
        return f"downstream/{self.arm.name}/{self.task.name}"

    @property
    def stands_on(self) -> str:
        return maker_of(self.arm)

    @property
    def field(self) -> str:
        """Where the recipe describes it."""
        return f"downstream.{self.task.name}"

    def sections(self) -> Mapping[str, Section]:
        return {self.field: self.task}

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        return heldout.evaluated(config, times=len({0, *self.task.marks, self.task.num_steps}))
