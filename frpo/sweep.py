"""`frpo sweep`: one recipe over many seeds and values of a field. Every seed is a run of its own; all share one team of actors.

The values become arms, so that all of them start from the same base policy of their seed and are compared pair by pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from frpo.config import Config, ConfigError

SWEPT = ("objective", "learner")
FRPO_ONLY = ("lam", "rho", "jackknife", "scale")
"""Fields of the objective that change nothing for other methods."""


def split(assignments: Sequence[str]) -> tuple[tuple[str, ...], dict[tuple[str, str], list[Any]]]:
    """Plain `--set` assignments, and those that give a list to a field under objective or learner: its values."""
    plain, swept = [], dict[tuple[str, str], list[Any]]()
    for text in assignments:
        path, _, value = text.partition("=")
        part, _, field = path.partition(".")
        values = yaml.safe_load(value) if part in SWEPT else None
        if isinstance(values, list) and field:
            if not values:
                raise ConfigError(f"--set {path}: an empty list; give at least one value")
            swept[part, field] = values
        else:
            plain.append(text)
    return tuple(plain), swept


def expand(config: Config, swept: dict[tuple[str, str], list[Any]]) -> Config:
    """Every arm with every combination of the values, named after them; a value that an arm's method does not read leaves
    the arm as it is. Raises pydantic's ValidationError for a value that does not fit."""
    tree = config.model_dump(mode="json")
    arms = []
    for arm, own in zip(tree["arms"], config.arms, strict=True):
        read = {k: v for k, v in swept.items() if own.objective.method == "frpo" or k not in {("objective", f) for f in FRPO_ONLY}}
        for values in itertools.product(*read.values()):
            changed = {**arm, "objective": dict(arm["objective"]), "learner": dict(arm["learner"])}
            for (part, field), value in zip(read, values, strict=True):
                if field not in changed[part]:
                    raise ConfigError(f"--set {part}.{field}: unknown field; `frpo config` lists the fields")
                changed[part][field] = value
                changed["name"] += f"-{field}{value}"
            arms.append(changed)
    return Config.model_validate({**tree, "arms": arms})


def seeds_of(config: Config, count: int, folder: Path) -> Iterator[Config]:
    """The run of each seed."""
    for seed in range(config.seed, config.seed + count):
        yield config.model_copy(update={"seed": seed, "run_dir": folder / f"seed-{seed:03d}"})


def run(config: Config, count: int, folder: Path) -> Path:
    """Bring every seed's run to its end, one after the other, and write sweep.json and sweep.html.

    Goes on where an earlier call was stopped; what is finished is skipped without starting anything.
    Raises ConfigError, WorkerFailed or RunStopped as a run does.
    """
    from frpo import cluster, stages
    from frpo.checkpoint import hold
    from frpo.metrics import RunLog
    from frpo.report import build_sweep

    with ExitStack() as stack:
        teams: list[cluster.Team] = []

        @contextmanager
        def team(resolved: Config, log: RunLog) -> Iterator[cluster.Team]:
            """The first run that needs actors starts them, for all that follow."""
            if not teams:
                teams.append(stack.enter_context(cluster.start(resolved, log)))
            yield teams[0]

        for number, one in enumerate(seeds_of(config, count, folder), 1):
            with hold(one.folder), RunLog(one.folder, one) as log:
                log.note(f"seed {one.seed}, run {number} of {count}")
                stages.run(one, log, team)
            build_sweep(folder)
    return build_sweep(folder)
