"""Brings a run folder to the state that its configuration asks for, stage by stage. Owns what is done in
which order; what happens inside a step is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from frpo import cluster, report, rundir
from frpo.config import Config
from frpo.harness import load_tasks
from frpo.metrics import RunLog
from frpo.outline import list_stages
from frpo.roles import Team
from frpo.stages.folders import Standing, supersede
from frpo.stages.inputs import Inputs, resolve_testbed
from frpo.stages.work import Work

TeamOf = Callable[[Config, RunLog], AbstractContextManager[Team]]


def run_stages(
    config: Config, standings: Sequence[Standing], log: RunLog, team_of: TeamOf = cluster.start_team
) -> None:
    """Do what is not done yet, and write the report. `standings` is how the stages stand
    (`folders.look_at_stages`).

    `team_of` gives the actors: started here, or those of an earlier run of the same shape. Raises ConfigError
    before anything starts; WorkerFailed or RunStopped when the run cannot go on.
    """
    # the driver computes little, and OpenMP's idle threads spin on cores that workers need
    torch.set_num_threads(1)
    rundir.write_description(config.folder, config)
    if all(s.state == "done" for s in standings):
        log.note(
            f"Finished already: all {len(standings)} stages in {config.folder} were made from this "
            "configuration."
        )
    else:
        resolved = resolve_testbed(config)
        standings = with_stages_of(resolved, standings)
        with log.waiting("reading the data"):
            inputs = Inputs(resolved, log)
            inputs.read_ahead([s.stage for s in standings if s.state != "done"])
            if resolved.harness:
                load_tasks(resolved.harness)
        with team_of(resolved, log) as team:
            supersede(config, standings, log)
            work = Work(resolved, team, log, inputs)
            for standing in standings:
                if standing.state == "done":
                    log.note(f"{standing.stage.name}: finished before, skipped")
                else:
                    work.do(standing)
    page = report.build_report(config.folder)
    log.note(report.read_verdict(config.folder))
    log.note(f"Report: {page}")


def with_stages_of(resolved: Config, standings: Sequence[Standing]) -> list[Standing]:
    """The same, each stage with the paths of what its recipe calls by name."""
    stages = {stage.name: stage for stage in list_stages(resolved)}
    return [replace(standing, stage=stages[standing.stage.name]) for standing in standings]
