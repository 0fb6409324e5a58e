"""`frpo sweep`: one recipe over many seeds and values of a field. Every seed is a run of its own.

The values become arms, so that all of them start from the same base policy of their seed and are compared
pair by pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from frpo.config import Config, ConfigError, ObjectiveConfig, RunLearner, Section
from frpo.config.estimators import merged_objective
from frpo.mistakes import explain
from frpo.recipe import parse_assignment

SWEPT = ("objective", "learner")
OF_THE_ESTIMATOR = "estimator."
"""Fields that only some kinds of estimator have."""


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


def list_seed_runs(config: Config, count: int, folder: Path) -> Iterator[Config]:
    """The run of each seed."""
    for seed in range(config.seed, config.seed + count):
        yield config.model_copy(update={"seed": seed, "run_dir": folder / f"seed-{seed:03d}"})


def run_sweep(config: Config, count: int, folder: Path) -> Path:
    """Bring every seed's run to its end, as many at once as the cluster holds, and write sweep.json and
    sweep.html.

    Goes on where an earlier call was stopped; what is finished is skipped without starting anything.
    Raises ConfigError, or WorkerFailed when a seed did not come to its end.
    """
    from frpo.report import build_sweep
    from frpo.teams import refuse_unfinished, run_all

    runs = tuple(list_seed_runs(config, count, folder))
    refuse_unfinished(runs, run_all(runs, folder, "seeds"))
    return build_sweep([folder], folder)
