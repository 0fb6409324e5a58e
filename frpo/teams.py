"""Many runs side by side: as many teams of actors as the cluster holds, a process each. A team stays up for
all the runs that it can do."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

from frpo import cluster
from frpo.config import Config, ConfigError
from frpo.disk import is_disk_full, tell_disk_full
from frpo.metrics import RunLog
from frpo.planning import plan_run
from frpo.roles import Team, WorkerFailed
from frpo.rundir import InUse, hold_folder
from frpo.stages.folders import look_and_tell, look_at_stages
from frpo.stages.walk import TeamOf, run_stages
from frpo.stops import RunStopped

STOP_S = 60.0
"""How long a team may take to come down after a stop."""
LOOK_S = 0.2
TOLD = 3
"""Exit code of a team that has said why; Python's own of an error that nobody expected is 1."""


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end."""

    run: str
    """Its folder below that of all."""
    reason: str
    by_itself: bool = False
    """It stopped over its own numbers: another try would end alike, and other runs are not concerned."""

    def __str__(self) -> str:
        return f"{self.run}: {self.reason}"


def run_all(
    runs: Sequence[Config], folder: Path, things: str, *, keep_policies: bool = True
) -> list[Failure]:
    """Bring every run below `folder` to its end, as many at once as the cluster holds; returns what failed.

    Goes on where an earlier call was stopped; what is finished is skipped without starting anything. The
    runs differ in what a team can be told (seed, policy, training), in the shape of their adapters, and in
    nothing else. `things` is what they are called. Without `keep_policies` what fine-tunes made is removed
    once they are measured. Raises ConfigError.
    """
    left = [run for run in runs if not is_complete(run)]
    if not left:
        return []
    largest = max(left, key=lambda run: plan_run(run).num_cpus)
    with cluster.share_cluster(largest, len(left)) as address:
        teams = min(len(left), cluster.teams_that_fit(plan_run(largest)))
        print(f"{len(left)} {things} to do, {teams} at a time", flush=True)
        return walk_in_processes(teams, Walk(tuple(left), folder, address, keep_policies))


def refuse_unfinished(runs: Sequence[Config], failures: Sequence[Failure]) -> None:
    """Raises WorkerFailed where a run is not finished, with what is known of it."""
    if any(not is_complete(run) for run in runs):
        reasons = "; ".join(map(str, failures))
        raise WorkerFailed(reasons or "some runs are in the hands of another process; wait for it")


def is_complete(run: Config) -> bool:
    done = all(standing.state == "done" for standing in look_at_stages(run))
    return done and (run.folder / "report.json").is_file()


@dataclass(frozen=True)
class Walk:
    """What every team is told."""

    runs: tuple[Config, ...]
    folder: Path
    address: str
    """Of the cluster."""
    keep_policies: bool


def walk_in_processes(teams: int, walk: Walk) -> list[Failure]:
    """Walk the runs with several teams, a process each; returns what failed. A stop of this process stops
    them too."""
    context = multiprocessing.get_context("spawn")
    failures: Queue[Failure] = context.Queue()
    walkers = [
        context.Process(target=walk_runs, args=(walk, failures), name=f"team {i}") for i in range(teams)
    ]
    failed: list[Failure] = []
    try:
        for walker in walkers:
            walker.start()
        while any(walker.is_alive() for walker in walkers):  # one that has told much waits until it is read
            with suppress(Empty):
                failed.append(failures.get(timeout=LOOK_S))
    finally:
        for walker in walkers:
            if walker.is_alive():
                walker.terminate()
        for walker in walkers:
            walker.join(STOP_S)
    ended = [walker for walker in walkers if walker.exitcode not in (0, TOLD)]
    while not failures.empty():
        failed.append(failures.get())
    return [*failed, *(Failure(walker.name, f"ended with exit code {walker.exitcode}") for walker in ended)]


def walk_runs(walk: Walk, failures: Queue[Failure]) -> None:
    """One team: do every run that is neither finished nor in the hands of another team. Runs in a process of
    its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=stop_with_the_parent, daemon=True).start()
    os.environ["RAY_ADDRESS"] = walk.address
    with KeptTeam() as kept:
        for run in walk.runs:
            if is_complete(run):
                continue
            name = str(run.folder.relative_to(walk.folder))
            try:
                with hold_folder(run.folder), RunLog(run.folder, run, f"{name}: ") as log:
                    run_stages(run, look_and_tell(run, log.note), log, kept.team_of)
                if not walk.keep_policies:
                    drop_fine_tuned(run.folder)
            except InUse:
                continue
            except RunStopped as error:
                failures.put(Failure(name, str(error), by_itself=True))
            except (ConfigError, WorkerFailed, OSError) as error:
                full = is_disk_full(error)
                if isinstance(error, OSError) and not full:
                    raise
                failures.put(Failure(name, f"{tell_disk_full(error) if full else error} ({log.where})"))
                sys.exit(TOLD)


def drop_fine_tuned(run: Path) -> None:
    """Remove what the fine-tunes of a finished run made; their results stay."""
    for name in ("policy", "checkpoints"):
        for folder in run.glob(f"downstream/*/*/{name}"):
            shutil.rmtree(folder)


class KeptTeam:
    """The actors that the last run left, for the next one."""

    def __init__(self, start: TeamOf = cluster.start_team) -> None:
        self.start = start
        self.stack = ExitStack()
        self.team: Team | None = None
        self.shape: object = None

    def __enter__(self) -> KeptTeam:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    @contextmanager
    def team_of(self, run: Config, log: RunLog) -> Iterator[Team]:
        """Those that are up, where they can do this run; else new ones in their place."""
        if self.team is None or self.shape != demands_of(run):
            self.stack.close()
            self.team = self.stack.enter_context(self.start(run, log))
            self.shape = demands_of(run)
        yield self.team


def demands_of(run: Config) -> tuple[Any, ...]:
    """What a team is started for, and keeps: its actors, and the adapters that its engines can serve. A
    policy it is told with each stage."""
    adapters = run.model.lora if run.sends_adapters else None
    return adapters, run.model.dtype, plan_run(run).actors


def stop_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
