"""`frpo chaos`: run a recipe again and again, kill its actors, its driver or its nodes at random moments, and
measure how soon that is noticed, how soon work goes on, and whether what comes out is what an undisturbed run
gives.

Runs that can end in the same weights, bit for bit (without staleness, on CPUs), must. In all others every
step must stand in metrics.jsonl once.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import ray
from rich.console import Console
from rich.table import Table

from frpo import cluster
from frpo.config import Config, LearnerConfig
from frpo.disk import sha256_of_folder, write_text
from frpo.outline import list_stages
from frpo.planning import plan_run
from frpo.raylets import Raylets, share_raylets
from frpo.records import Record
from frpo.roles import WorkerFailed
from frpo.rows import read_rows

Target = Literal["actors", "driver", "nodes"]

POLL_S = 0.1
QUIET_S = 5.0
"""The next kill comes at most so long after the last was got over."""
SETTLE_S = 15.0
"""How long a run is watched after a kill, at least: a death is felt by whoever needs the actor next."""
LIMIT_S = 600.0
"""Longest wait for a run to do something."""
TRAINS = ("step", "finetune")
"""Kinds of rows of a stage that trains."""
NOTICED = re.compile(r"was killed|died (during|before)|did not answer")
"""What a run says of a death, in run.log."""


class Kill(Record):
    """One kill and what came of it."""

    role: str
    """driver, node, or rollout, learner, ..."""
    stage: str
    """What was being done."""
    step: int
    noticed_s: float | None
    """Until the run said so; None where nobody needed the actor before it was back. Of a driver: until it was
    started again."""
    pause_s: float
    """The longest time without a step, afterwards: what is done again does not count as one. Of a driver it
    includes all that a start takes. (An evaluation is a pause too.)"""


class Round(Record):
    """One run, from its start to its end."""

    folder: str
    kills: int
    same_weights: bool | None
    """As the undisturbed run's, in every arm and fine-tune; None where that cannot be."""
    whole: bool
    """Whether every step of every stage stands in metrics.jsonl, once and in order."""


class Chaos(Record):
    """chaos.json"""

    recipe: str
    seed: int
    kills: tuple[Kill, ...] = ()
    rounds: tuple[Round, ...] = ()


@dataclass(frozen=True)
class ChaosPlan:
    """What is asked for."""

    recipe: Path
    sets: tuple[str, ...]
    folder: Path
    kills: int
    seed: int
    target: Target


def run_chaos(config: Config, plan: ChaosPlan, tell: Callable[[str], None]) -> Chaos:
    """Kill until `plan.kills` are done and the last run has come to its end; goes on from chaos.json. Raises
    WorkerFailed where a run ends, or hangs, that should have gone on."""
    done = read_chaos(plan)
    with open_cluster(config, plan.target) as (address, strike):
        undisturbed = Run(plan, plan.folder / "undisturbed", address)
        with undisturbed.going():
            undisturbed.wait_for_end()
        while len(done.kills) < plan.kills:
            done = disturb(config, plan, done, Disturbance(address, strike, tell))
    return done


Strike = Callable[["Watched", "Run", random.Random], "Kill | None"]
"""One kill, and what came of it; None where there was nobody to kill."""


@dataclass(frozen=True)
class Disturbance:
    """What the runs of a plan share."""

    address: str
    """Of the cluster."""
    strike: Strike
    tell: Callable[[str], None]


@contextmanager
def open_cluster(config: Config, target: Target) -> Iterator[tuple[str, Strike]]:
    """The cluster's address, and what kills there."""
    if target == "nodes":
        needs, store = plan_run(config).num_cpus, cluster.object_store_bytes(config)
        with share_raylets(config, needs, store) as raylets:
            yield raylets.address, partial(kill_node, raylets)
    else:
        with cluster.share_cluster(config, 1) as address:
            yield address, kill_driver if target == "driver" else kill_actor


def read_chaos(plan: ChaosPlan) -> Chaos:
    file = plan.folder / "chaos.json"
    if file.exists():
        return Chaos.model_validate_json(file.read_text())
    return Chaos(recipe=plan.recipe.name, seed=plan.seed)


def disturb(config: Config, plan: ChaosPlan, done: Chaos, by: Disturbance) -> Chaos:
    """One run with as many kills as it takes, or as are left."""
    chance = random.Random(f"{plan.seed} {len(done.rounds)}")
    watched = Watched(config, plan.folder / f"round-{len(done.rounds):03d}")
    run = Run(plan, watched.folder, by.address)
    before = len(done.kills)
    with run.going():
        watched.longest_pause(run)  # until it has begun
        while len(done.kills) < plan.kills:
            time.sleep(chance.uniform(0.0, QUIET_S))
            if run.is_over:
                break
            kill = by.strike(watched, run, chance)
            if kill:
                done = done.model_copy(update={"kills": (*done.kills, kill)})
                write_text(plan.folder / "chaos.json", done.model_dump_json(indent=1))
                by.tell(f"{len(done.kills)}/{plan.kills} {say(kill)}")
        while not run.is_over:
            watched.longest_pause(run)  # raises where it hangs
        run.wait_for_end()
    ended = judge(config, plan, watched.folder, len(done.kills) - before)
    done = done.model_copy(update={"rounds": (*done.rounds, ended)})
    write_text(plan.folder / "chaos.json", done.model_dump_json(indent=1))
    return done


def say(kill: Kill) -> str:
    noticed = "by nobody" if kill.noticed_s is None else f"after {kill.noticed_s:.1f} s"
    where = f"{kill.role} in {kill.stage}, step {kill.step}"
    return f"{where}: noticed {noticed}, longest pause {kill.pause_s:.1f} s"


class Run:
    """A process of `frpo run` in a folder."""

    def __init__(self, plan: ChaosPlan, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.command = [sys.executable, "-m", "frpo", "run", str(plan.recipe), "--run-dir", str(folder)]
        apart = ("cluster.strategy=SPREAD",) if plan.target == "nodes" else ()
        for assignment in (*apart, *plan.sets, f"cluster.max_restarts={plan.kills + 3}"):
            self.command += ["--set", assignment]

    @contextmanager
    def going(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            if not self.is_over:
                self.process.terminate()
                self.process.wait(60)

    def start(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "RAY_ADDRESS": self.address}
        with self.folder.with_suffix(".out").open("ab") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=subprocess.STDOUT, env=env)

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def wait_for_end(self) -> None:
        """Raises WorkerFailed where it does not come to its end."""
        code = self.process.wait()
        if code != 0:
            said = self.folder.with_suffix(".out").read_text(errors="replace").strip().splitlines()[-12:]
            lines = "\n".join(said)
            raise WorkerFailed(f"the run in {self.folder} ended with exit code {code}:\n{lines}")


class Watched:
    """A run, as its folder shows it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder = folder
        self.order = {stage.name: number for number, stage in enumerate(list_stages(config))}

    def position(self) -> tuple[int, int, str]:
        """The furthest step: its stage's place, its number, its stage."""
        rows = [row for row in read_rows(self.folder) if row["kind"] in TRAINS]
        places = [(self.order.get(row["stage"], -1), row["step"], row["stage"]) for row in rows]
        finished = [name for name in self.order if (self.folder / name / "done.json").exists()]
        places += [(self.order[name] + 1, 0, name) for name in finished]
        return max(places, default=(-1, 0, "the start"))

    def longest_pause(self, run: Run, settle_s: float = 0.0) -> float:
        """Seconds, until it is further than now and has been watched for `settle_s`, or is over. Raises
        WorkerFailed."""
        furthest = self.position()
        began = last = time.monotonic()
        pause = 0.0
        while not run.is_over:
            time.sleep(POLL_S)
            now, position = time.monotonic(), self.position()
            pause = max(pause, now - last)
            if position > furthest:
                furthest, last = position, now
                if now - began >= settle_s:
                    break
            if pause > LIMIT_S:
                raise WorkerFailed(f"the run in {self.folder} did nothing for {LIMIT_S:g} s.")
        return pause

    def noticed(self, since: float) -> float | None:
        """Seconds after `since`, by time.time, until run.log says that somebody died."""
        for line in (self.folder / "run.log").read_text(errors="replace").splitlines():
            at = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) ", line)
            if not at or not NOTICED.search(line):
                continue
            when = datetime.strptime(at[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(at[2]) / 1000
            if when >= since:
                return when - since
        return None


def kill_actor(watched: Watched, run: Run, chance: random.Random) -> Kill | None:
    """One of the run's actors, whichever role, wherever it is; None where there is none."""
    actors = find_actors(watched.folder)
    if not actors:
        return None
    role = chance.choice(sorted(actors))
    victim = chance.choice(actors[role])
    _, step, stage = watched.position()
    began = time.time()
    try:
        handle = ray.get_actor(victim.name, victim.namespace)
    except ValueError:  # the run has come to its end since
        return None
    # as a crash: what it was asked for fails, and Ray starts it again
    ray.kill(handle, no_restart=False)
    pause_s = watched.longest_pause(run, SETTLE_S)
    return Kill(role=role, stage=stage, step=step, noticed_s=watched.noticed(began), pause_s=pause_s)


def kill_driver(watched: Watched, run: Run, chance: random.Random) -> Kill:
    """And start it again, as a user would."""
    _, step, stage = watched.position()
    began = time.monotonic()
    run.process.kill()
    run.process.wait()
    run.start()
    noticed_s = time.monotonic() - began
    pause_s = watched.longest_pause(run)
    return Kill(role="driver", stage=stage, step=step, noticed_s=noticed_s, pause_s=pause_s)


def kill_node(raylets: Raylets, watched: Watched, run: Run, chance: random.Random) -> Kill:
    """One of those that hold the actors; another joins in its place."""
    _, step, stage = watched.position()
    began = time.time()
    raylets.replace_one(chance)
    pause_s = watched.longest_pause(run, SETTLE_S)
    return Kill(role="node", stage=stage, step=step, noticed_s=watched.noticed(began), pause_s=pause_s)


@dataclass(frozen=True)
class Victim:
    """An actor, by its name on the dashboard."""

    name: str
    namespace: str


def find_actors(folder: Path) -> dict[str, list[Victim]]:
    """Those of the run in `folder`, by role. Of a run whose driver was killed Ray may still hold the old
    ones for some seconds; its placement group, which is the namespace, is another."""
    actors: dict[str, list[Victim]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name = re.fullmatch(rf"{re.escape(folder.name)} (.+) \d+", actor["name"])
        if name:
            actors.setdefault(name[1], []).append(Victim(actor["name"], actor["namespace"]))
    return actors


def judge(config: Config, plan: ChaosPlan, folder: Path, kills: int) -> Round:
    """Hold a run that came to its end against the undisturbed one."""
    same = None
    if not config.rollout.staleness:
        same = digests_of(config, folder) == digests_of(config, plan.folder / "undisturbed")
    return Round(folder=folder.name, kills=kills, same_weights=same, whole=is_whole(config, folder))


def digests_of(config: Config, folder: Path) -> dict[str, str]:
    """Of every policy that it trained, by stage."""
    policies = {stage.name: folder / stage.name / "policy" for stage in list_stages(config)}
    return {name: sha256_of_folder(policy) for name, policy in policies.items() if policy.is_dir()}


def is_whole(config: Config, folder: Path) -> bool:
    steps: dict[str, list[int]] = {}
    for row in read_rows(folder):
        if row["kind"] in TRAINS:
            steps.setdefault(row["stage"], []).append(row["step"])
    for stage in list_stages(config):
        training = stage.training()
        if training is None:
            continue
        given = steps.get(stage.name, [])
        early = isinstance(training.settings, LearnerConfig) and training.settings.stop_at_reward is not None
        last = len(given) if given and early else training.num_steps
        if given != list(range(1, last + 1)):
            return False
    return True


def print_chaos(chaos: Chaos, console: Console) -> None:
    """By role: how many, and the median and largest seconds until noticed and of the pause."""
    table = Table("role", "kills", "noticed", "median s", "largest s", "pause: median s", "largest s")
    for role in sorted({kill.role for kill in chaos.kills}):
        own = [kill for kill in chaos.kills if kill.role == role]
        noticed = sorted(kill.noticed_s for kill in own if kill.noticed_s is not None)
        pauses = sorted(kill.pause_s for kill in own)
        table.add_row(role, str(len(own)), str(len(noticed)), *_spread(noticed), *_spread(pauses))
    console.print(table)
    whole = sum(ended.whole for ended in chaos.rounds)
    compared = [ended for ended in chaos.rounds if ended.same_weights is not None]
    same = sum(bool(ended.same_weights) for ended in compared)
    console.print(
        f"{len(chaos.rounds)} runs came to their end: {whole} with every step once; {same} of "
        f"{len(compared)} compared have the weights of the undisturbed run."
    )


def _spread(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "-", "-"
    return f"{values[len(values) // 2]:.1f}", f"{values[-1]:.1f}"
