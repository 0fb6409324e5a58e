"""Tasks of lm-evaluation-harness as a recipe names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frpo.config import ConfigError, HarnessConfig


def tasks_of(harness: HarnessConfig) -> tuple[list[str | dict[str, Any]], Any]:
    """What lm_eval.simple_evaluate wants: tasks (names, or the trees of task files) and the manager that knows them.

    Raises ConfigError for a name that lm-eval does not have, or a file that it can't read.
    """
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise ConfigError(f"harness: lm-evaluation-harness is missing ({error}); install frpo with the extra 'eval'") from None

    names = [t for t in harness.tasks if not _is_file(t)]
    manager = TaskManager(include_defaults=bool(names))
    found: list[str | dict[str, Any]] = []
    for i, task in enumerate(harness.tasks):
        if not _is_file(task):
            if task not in manager.all_tasks:
                raise ConfigError(
                    f"harness.tasks.{i}: lm-evaluation-harness {_version()} has no task {task!r}; `lm-eval ls tasks` lists them"
                )
            found.append(task)
            continue
        if not Path(task).is_file():
            raise ConfigError(f"harness.tasks.{i}: no such file {task}; give a task YAML file or the name of a task")
        tree = load_yaml(task)
        if not isinstance(tree, dict) or "task" not in tree:
            raise ConfigError(f"harness.tasks.{i}: {task} names no task; it needs a field 'task'")
        for files in (tree.get("dataset_kwargs") or {}).get("data_files", {}).values():
            for file in [files] if isinstance(files, str) else files:
                if not Path(file).is_file():
                    raise ConfigError(f"harness.tasks.{i}: {task} reads {file}, which is not there; mend dataset_kwargs.data_files")
        found.append(tree)
    return found, manager


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
