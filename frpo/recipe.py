"""Recipe files: YAML plus `--set a.b=c` -> Config, and back. One line per mistake: field, value, remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from frpo.config import Config, ConfigError, Section

S = TypeVar("S", bound=Section)


def _set(tree: dict[str, Any], assignment: str) -> None:
    """Apply one "a.b=c"; list items are named by position or by their `name`. The value is YAML."""
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment}: write it as field.path=value")
    node: Any = tree
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            if key in names:
                index = names.index(key)
            elif key.isdigit() and int(key) < len(node):
                index = int(key)
            else:
                raise ConfigError(f"--set {path}: no item {key!r} here; choose a position or one of {names}")
            key_: Any = index
        elif isinstance(node, dict):
            key_ = key
            if not last and node.get(key) is None:
                node[key] = {}
        else:
            raise ConfigError(f"--set {path}: {'.'.join(keys[:depth])} is a value, it has no field {key!r}")
        if last:
            node[key_] = yaml.safe_load(text)
        else:
            node = node[key_]


@contextmanager
def checked() -> Iterator[None]:
    """Turn what pydantic finds wrong into one ConfigError, a line per mistake."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def load(recipe: Path, assignments: tuple[str, ...] = ()) -> Config:
    """Read a recipe and apply `--set` assignments. Raises as `read` does."""
    return read(recipe, assignments, Config)


def read(recipe: Path, assignments: tuple[str, ...], kind: type[S]) -> S:
    """Read a YAML file into a section and apply `--set` assignments.

    Raises ConfigError with one line per mistake: field, value, remedy.
    """
    try:
        tree = yaml.safe_load(recipe.read_text())
    except OSError as error:
        raise ConfigError(f"recipe {recipe}: {error.strerror or error}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {recipe}: expected fields, found {type(tree).__name__}")
    for assignment in assignments:
        _set(tree, assignment)
    with checked():
        return kind.model_validate(tree)


def _explain(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"] if p not in ("function", "model")) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown field (value {error['input']!r}); `frpo config` lists the fields"
    if error["type"] == "missing":
        return f"{where}: missing; it has no default"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["loc"] == () else f"{where}: {message} (value {error['input']!r})"


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
