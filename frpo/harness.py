"""Tasks of lm-evaluation-harness as a recipe names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frpo.config import ConfigError, HarnessConfig


@dataclass(frozen=True)
class FunctionTag:
    """What a task calls, written as !function module.name."""

    text: str


class TaskLoader(yaml.SafeLoader):
    """Reads any tag."""


def _read_tag(loader: TaskLoader, tag: str, node: yaml.Node) -> Any:
    return FunctionTag(str(node.value)) if tag == "function" else None


TaskLoader.add_multi_constructor("!", _read_tag)


def read_task(file: Path) -> dict[str, Any]:
    """A task file, with FunctionTags for what it calls; what it includes is left out. Raises ConfigError,
    without the field."""
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), TaskLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file} cannot be read ({' '.join(str(error).split())}); give a task YAML file"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds no fields; give a task YAML file")
    return tree


def data_files(tree: dict[str, Any]) -> list[str]:
    """The local files that a task reads."""
    arguments = tree.get("dataset_kwargs")
    if not isinstance(arguments, dict):
        return []
    files = arguments.get("data_files")
    groups = list(files.values()) if isinstance(files, dict) else [files]
    names: list[Any] = []
    for group in groups:
        names += group if isinstance(group, list) else [group]
    return [name for name in names if isinstance(name, str)]


def modules_of(tree: dict[str, Any]) -> set[str]:
    """Of the functions that a task calls."""
    modules = {tag.text.rpartition(".")[0] for tag in _function_tags(tree, 0)}
    return modules - {""}


DEEPEST = 50
"""Levels of a task that are looked through; an alias may stand inside what it names."""


def _function_tags(node: Any, depth: int) -> Iterator[FunctionTag]:
    if isinstance(node, FunctionTag):
        yield node
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list) and depth < DEEPEST:
        for part in node:
            yield from _function_tags(part, depth + 1)


def check_files(harness: HarnessConfig) -> None:
    """That task files and the data that they name are there, as far as it can be told without lm-eval. Raises
    ConfigError."""
    for i, task in enumerate(harness.tasks):
        if not _is_file(task):
            continue
        if not Path(task).is_file():
            raise ConfigError(
                f"harness.tasks.{i}: no such file {task}; give a task YAML file or the name of a task"
            )
        try:
            tree = read_task(Path(task))
        except ConfigError as error:
            raise ConfigError(f"harness.tasks.{i}: {error}") from None
        if not {"task", "include"} & set(tree):
            raise ConfigError(f"harness.tasks.{i}: {task} names no task; it needs a field 'task'")
        for file in data_files(tree):
            if not Path(file).is_file():
                raise ConfigError(
                    f"harness.tasks.{i}: {task} reads {file}, which is not there; mend "
                    "dataset_kwargs.data_files"
                )


def load_tasks(harness: HarnessConfig) -> tuple[list[str | dict[str, Any]], Any]:
    """What lm_eval.simple_evaluate wants: tasks (names, or the trees of task files) and the manager that
    knows them.

    Raises ConfigError for a name that lm-eval does not have, or a file that it can't read.
    """
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise ConfigError(
            f"harness: lm-evaluation-harness is missing ({error}); install frpo with the extra 'eval'"
        ) from None

    check_files(harness)
    manager = TaskManager(include_defaults=not all(map(_is_file, harness.tasks)))
    tasks: list[str | dict[str, Any]] = []
    for i, task in enumerate(harness.tasks):
        if not _is_file(task):
            if task not in manager.all_tasks:
                raise ConfigError(
                    f"harness.tasks.{i}: lm-evaluation-harness {_harness_version()} has no task {task!r}; "
                    "`lm-eval ls tasks` lists them"
                )
            tasks.append(task)
            continue
        tree = load_yaml(task)
        if not isinstance(tree, dict) or "task" not in tree:
            raise ConfigError(f"harness.tasks.{i}: {task} names no task; it needs a field 'task'")
        tasks.append(tree)
    return tasks, manager


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _harness_version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
