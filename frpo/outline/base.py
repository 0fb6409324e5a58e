"""The stage that makes the base model: the reference, and the start of every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frpo.config import BaseConfig, Config
from frpo.outline.stage import Data, Heldout, Stage, Subject, Supervised, Training, Workbench
from frpo.records import StageResult


@dataclass(frozen=True)
class Base(Stage):
    settings: BaseConfig | None
    """None: the model itself is the base."""

    @property
    def name(self) -> str:
        return "base"

    @property
    def stands_on(self) -> str:
        return ""

    def data(self) -> Sequence[Data]:
        if self.settings is None:
            return ()
        return (Data("base.data", self.settings.data, self.settings.max_tokens),)

    def training(self) -> Training | None:
        return Training("base", self.settings, self.settings.num_steps) if self.settings else None

    def num_measured(self, config: Config, heldout: Heldout) -> int:
        return heldout.evaluated(config, times=1)

    def do(self, work: Workbench) -> StageResult:
        if self.settings:
            finetune = Supervised(self.settings, self.data()[0], in_order=self.settings.in_order)
            for _ in work.finetune(self, finetune, []):
                raise AssertionError("it pauses nowhere")
        work.load_policy(work.policy_of(self.name))
        return StageResult(stage=self.name, evaluations=(work.measure(self, 0, Subject("base")),))
