"""The stages of a run, each resumable, each skipped when it was finished from the same inputs:

    base -> for each arm: rlhf/<arm> -> certify/<arm>, downstream/<arm>/<task>, attack/<arm>/<radius> -> report

with harness/<policy> after each policy that is kept, where the recipe asks for benchmarks.

Owns what is done in which order; what happens inside a step is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from frpo import checkpoint, cluster, report
from frpo.config import Config
from frpo.harness import tasks_of
from frpo.metrics import RunLog
from frpo.stages.graph import Stage, stages_of
from frpo.stages.inputs import Inputs, resolve
from frpo.stages.work import Work

__all__ = ["Stage", "run", "stages_of"]

TeamOf = Callable[[Config, RunLog], AbstractContextManager[cluster.Team]]


def run(config: Config, log: RunLog, team_of: TeamOf = cluster.start) -> None:
    """Bring the run folder to the state that the configuration asks for, and write its report.

    `team_of` gives the actors: started here, or those of an earlier run of the same shape. Raises ConfigError before anything starts; WorkerFailed or RunStopped when the run cannot go on.
    """
    torch.set_num_threads(1)  # the driver computes little, and OpenMP's idle threads spin on cores that workers need
    stages = stages_of(config)
    done = [checkpoint.read_result(config.folder / s.name, s.inputs) for s in stages]
    checkpoint.describe(config.folder, config)
    if all(done):
        log.note(f"Finished already: all {len(stages)} stages in {config.folder} were made from this configuration.")
    else:
        resolved = resolve(config)
        with log.waiting("reading the data"):
            inputs = Inputs(resolved, log)
            inputs.read_ahead([stage for stage, result in zip(stages, done, strict=True) if result is None])
            if resolved.harness:
                tasks_of(resolved.harness)
        with team_of(resolved, log) as team:
            work = Work(resolved, team, log, inputs)
            for stage, result in zip(stages, done, strict=True):
                if result is None:
                    work.do(stage)
                else:
                    log.note(f"{stage.name}: finished before, skipped")
    page = report.build(config.folder)
    log.note(f"Report: {page}")
