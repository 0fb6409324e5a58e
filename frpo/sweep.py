"""`frpo sweep`: one recipe over many seeds and values of a field. Every seed is a run of its own.

As many teams of actors as fit work side by side, a process each; a team stays up for all the seeds that it
does.

The values become arms, so that all of them start from the same base policy of their seed and are compared
pair by pair.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from frpo.config import Config, ConfigError, ObjectiveConfig, RunLearner, Section
from frpo.config.estimators import merged_objective
from frpo.mistakes import explain
from frpo.recipe import parse_assignment
from frpo.roles import Team

SWEPT = ("objective", "learner")
OF_THE_ESTIMATOR = "estimator."
"""Fields that only some kinds of estimator have."""
STOP_S = 60.0
"""How long a team may take to come down after a stop."""


def split_assignments(assignments: Sequence[str]) -> tuple[tuple[str, ...], dict[tuple[str, str], list[Any]]]:
    """Plain `--set` assignments, and those that give a list to a field under objective or learner: its
    values."""
    plain: list[str] = []
    swept: dict[tuple[str, str], list[Any]] = {}
    for text in assignments:
        path, values = parse_assignment(text)
        part, _, field = path.partition(".")
        if part in SWEPT and isinstance(values, list) and field:
            if not values:
                raise ConfigError(f"--set {path}: an empty list; give at least one value")
            swept[part, field] = values
        else:
            plain.append(text)
    return tuple(plain), swept


def expand_arms(config: Config, swept: dict[tuple[str, str], list[Any]]) -> Config:
    """Every arm with every combination of the values, named after them; a value that an arm's estimator has
    no field for leaves the arm as it is. Raises ConfigError for a value that does not fit its field,
    pydantic's ValidationError for one that does not fit an arm."""
    check_values(config, swept)
    tree = config.model_dump(mode="json")
    arms = tree["arms"]
    for (part, field), values in swept.items():
        arms = list(itertools.chain.from_iterable(vary_arm(arm, part, field, values) for arm in arms))
    return Config.model_validate({**tree, "arms": arms})


def vary_arm(arm: dict[str, Any], part: str, field: str, values: list[Any]) -> list[dict[str, Any]]:
    """An arm with each of the values in a field, or as it is where its estimator has no such field."""
    name = field.removeprefix(OF_THE_ESTIMATOR)
    if name == field:
        return [{**_rename_arm(arm, field, value), part: {**arm[part], field: value}} for value in values]
    if name not in ObjectiveConfig.model_validate(arm[part]).estimator.model_dump():
        return [arm]
    return [
        {**_rename_arm(arm, name, value), part: merged_objective(arm[part], {"estimator": {name: value}})}
        for value in values
    ]


def _rename_arm(arm: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    return {**arm, "name": f"{arm['name']}-{field}{value}"}


def check_values(config: Config, swept: dict[tuple[str, str], list[Any]]) -> None:
    """Raises ConfigError for an unknown field, or a value that does not fit it, whatever the arm."""
    for (part, field), values in swept.items():
        for value in values:
            section, fields = _with_value(config, part, field, value)
            try:
                section.model_validate(fields)
            except ValidationError as error:
                if all(e["loc"] for e in error.errors()):
                    raise ConfigError(f"--set {part}.{explain(error, section)}") from None


def _with_value(config: Config, part: str, field: str, value: Any) -> tuple[type[Section], dict[str, Any]]:
    """The run's objective or learner with a value in a field; a field of an estimator in the first estimator
    that has it, the run's or else an arm's."""
    if part == "learner":
        return RunLearner, {**config.learner.model_dump(), field: value}
    own = config.objective.model_dump()
    name = field.removeprefix(OF_THE_ESTIMATOR)
    if name == field:
        return ObjectiveConfig, {**own, field: value}
    objectives = [own, *(arm.objective.model_dump() for arm in config.arms)]
    having = [objective for objective in objectives if name in objective["estimator"]]
    return ObjectiveConfig, merged_objective((*having, own)[0], {"estimator": {name: value}})


def seeds_of(config: Config, count: int, folder: Path) -> Iterator[Config]:
    """The run of each seed."""
    for seed in range(config.seed, config.seed + count):
        yield config.model_copy(update={"seed": seed, "run_dir": folder / f"seed-{seed:03d}"})


def run_sweep(config: Config, count: int, folder: Path) -> Path:
    """Bring every seed's run to its end, as many at once as the cluster holds, and write sweep.json and
    sweep.html.

    Goes on where an earlier call was stopped; what is finished is skipped without starting anything.
    Raises ConfigError, or WorkerFailed when a seed did not come to its end.
    """
    from frpo import cluster
    from frpo.planning import plan_run
    from frpo.report import build_sweep
    from frpo.roles import WorkerFailed

    left = [one for one in seeds_of(config, count, folder) if not is_finished(one)]
    if left:
        with cluster.share_cluster(config, len(left)) as address:
            teams = min(len(left), cluster.teams_that_fit(plan_run(config)))
            print(f"{len(left)} seeds to do, {teams} at a time", flush=True)
            failed = walk_in_processes(teams, config, count, folder, address)
        if any(not is_finished(one) for one in left):
            raise WorkerFailed(
                "; ".join(failed) or "some seeds are in the hands of another sweep; wait for it"
            )
    return build_sweep([folder], folder)


def is_finished(one: Config) -> bool:
    from frpo.stages.folders import look_at_stages

    return all(s.state == "done" for s in look_at_stages(one)) and (one.folder / "report.json").is_file()


def walk_in_processes(teams: int, config: Config, count: int, folder: Path, address: str) -> list[str]:
    """Walk the seeds with several teams, a process each; returns what failed. A stop of this process stops
    them too."""
    context = multiprocessing.get_context("spawn")
    failures: Queue[str] = context.Queue()
    walkers = [
        context.Process(target=walk_seeds, args=(config, count, folder, address, failures), name=f"team {i}")
        for i in range(teams)
    ]
    try:
        for walker in walkers:
            walker.start()
        for walker in walkers:
            walker.join()
    finally:
        for walker in walkers:
            if walker.is_alive():
                walker.terminate()
        for walker in walkers:
            walker.join(STOP_S)
    ended = [walker for walker in walkers if walker.exitcode not in (0, 1)]
    failed = [f"{walker.name} ended with exit code {walker.exitcode}" for walker in ended]
    while not failures.empty():
        failed.append(failures.get())
    return failed


def walk_seeds(config: Config, count: int, folder: Path, address: str, failures: Queue[str]) -> None:
    """One team: do every seed that is neither finished nor in the hands of another team. Runs in a process of
    its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=stop_with_the_parent, daemon=True).start()
    os.environ["RAY_ADDRESS"] = address
    from frpo import cluster
    from frpo.metrics import RunLog
    from frpo.roles import WorkerFailed
    from frpo.rundir import InUse, hold_folder
    from frpo.stages.folders import look_and_tell
    from frpo.stages.walk import run as run_stages
    from frpo.stops import RunStopped

    with ExitStack() as stack:
        teams: list[Team] = []

        @contextmanager
        def team(resolved: Config, log: RunLog) -> Iterator[Team]:
            """The first run that needs actors starts them, for all that follow."""
            if not teams:
                teams.append(stack.enter_context(cluster.start_team(resolved, log)))
            yield teams[0]

        for one in seeds_of(config, count, folder):
            if is_finished(one):
                continue
            try:
                with hold_folder(one.folder), RunLog(one.folder, one, f"seed {one.seed}: ") as log:
                    run_stages(one, look_and_tell(one, log.note), log, team)
            except InUse:
                continue
            except (ConfigError, WorkerFailed, RunStopped) as error:
                failures.put(f"seed {one.seed} ({log.where}): {error}")
                sys.exit(1)


def stop_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
