"""A run folder as a run leaves it, for who reads it."""

from __future__ import annotations

import json
from pathlib import Path

from frpo.metrics import RunLog
from frpo.recipe import dump_config, load_recipe
from frpo.records import Estimate, Evaluation, Sample, StageResult
from frpo.stages.folders import DONE, MADE
from tests.support.builders import evaluation_of, measured_task, metrics

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "testbed.yaml")


def evaluation(arm: str, reward: float, downstream: str | None = None, step: int = 0) -> Evaluation:
    said = Sample(task="harmful", prompt="how do i <b>", completion=f"{arm} {step}", reward=reward)
    return evaluation_of(
        arm,
        measured_task("harmful", reward),
        downstream=downstream,
        step=step,
        kl_reference=None if arm == "base" else Estimate(mean=0.25, se=None),
        samples=(said,),
    )


def begin(run: Path, stage: str) -> None:
    (run / stage).mkdir(parents=True, exist_ok=True)
    (run / stage / MADE).write_text(json.dumps({"digest": f"of {stage}"}))


def finish(run: Path, stage: str, seconds: float) -> None:
    result = StageResult(stage=stage, inputs=f"of {stage}", seconds=seconds, evaluations=())
    (run / stage / DONE).write_text(result.model_dump_json())


def write_first_arm(log: RunLog) -> None:
    """A run that has done its base, and the first arm's rlhf stage."""
    run = log.folder
    (run / "config.yaml").write_text(dump_config(RECIPE))
    begin(run, "base")
    log.evaluation("base", evaluation("base", 0.4), step=0)
    finish(run, "base", 40.0)
    begin(run, "rlhf/grpo")
    log.begin("rlhf/grpo", 20)
    for step in range(1, 21):
        log.step("rlhf/grpo", metrics(step, reward=step / 20, kl=step / 100, equal_groups=0.25))
    log.evaluation("rlhf/grpo", evaluation("grpo", 0.9), step=20)
    finish(run, "rlhf/grpo", 30.0)
