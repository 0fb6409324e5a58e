"""The stage that runs benchmarks on what another one has left."""

from __future__ import annotations

from dataclasses import dataclass

from frpo.config import Config
from frpo.outline.stage import Heldout, Stage, Workbench
from frpo.records import StageResult


@dataclass(frozen=True)
class Harness(Stage):
    policy: str
    """Name of the stage whose policy it is."""

    @property
    def name(self) -> str:
        _, _, owner = self.policy.partition("/")
        return f"harness/{owner or self.policy}"

    @property
    def stands_on(self) -> str:
        return self.policy

    def num_measured(self, config: Config, heldout: Heldout) -> int | None:
        return None

    def do(self, work: Workbench) -> StageResult:
        scores = work.run_benchmarks(self, work.policy_of(self.stands_on))
        return StageResult(stage=self.name, evaluations=(), scores=scores)
