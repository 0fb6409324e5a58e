"""Recipe files: YAML plus `--set a.b=c` -> Config, and back. One line per mistake: field, value, remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from frpo import tree
from frpo.config import Config, ConfigError, Section
from frpo.mistakes import explain, shorten_value

S = TypeVar("S", bound=Section)

SHIPPED = Path(__file__).parent / "recipes"
"""Recipes that come with frpo, and go by their names."""
MOST_BYTES = 200_000
"""Of a recipe: the largest that is read in a second."""


def parse_assignment(assignment: str) -> tuple[str, Any]:
    """The path and the value of one "a.b=c"; the value is YAML. Raises ConfigError."""
    path, equals, text = assignment.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {assignment[:80]}: write it as field.path=value")
    return path, tree.parse_yaml(text, f"--set {path}")


def set_field(fields: dict[str, Any], path: str, value: Any) -> None:
    """Put a value in its place; list items are named by position or by their `name`. Raises ConfigError."""
    node: Any = fields
    keys = path.split(".")
    for depth, key in enumerate(keys):
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {path}: {'.'.join(keys[:depth])} is a value, it has no field {key!r}")
        place: Any = _position_of(node, key, path) if isinstance(node, list) else key
        if depth == len(keys) - 1:
            node[place] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[place]


def _position_of(items: list[Any], key: str, path: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    positions = [str(i) for i in range(len(items))]
    if key in positions:
        return positions.index(key)
    raise ConfigError(f"--set {path}: no item {key!r} here; choose a position or one of {names[:10]}")


@contextmanager
def checked(kind: type[Section] = Config) -> Iterator[None]:
    """Turn what pydantic finds wrong with a section into one ConfigError, a line per mistake."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(explain(error, kind)) from None


def find_recipe(recipe: Path) -> Path:
    """The file that RECIPE names: its path, or else a recipe that comes with frpo by its name. Raises
    ConfigError where it is neither."""
    given = Path(os.path.expanduser(recipe))
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if str(recipe) in shipped and not given.is_file():
        return shipped[str(recipe)]
    try:
        given.stat()
    except FileNotFoundError as error:
        raise ConfigError(
            f"recipe {recipe}: {error.strerror}; give the path of a YAML file, or the name of one that comes "
            f"with frpo: {', '.join(shipped)}"
        ) from None
    except OSError:
        pass  # whoever reads it tells
    return given


def load_recipe(recipe: Path, assignments: tuple[str, ...] = ()) -> Config:
    """Read the recipe of a run, by its path or name, and apply `--set` assignments. Raises as `find_recipe`
    and `read_section` do, and where there is nothing to train on."""
    config = read_section(find_recipe(recipe), assignments, Config)
    if config.arms and not config.data.train:
        raise ConfigError("data.train: a list of 0; every arm is trained on prompts, give some")
    return config


def read_section(recipe: Path, assignments: tuple[str, ...], kind: type[S]) -> S:
    """Read a YAML file into a section and apply `--set` assignments in their order: of two for one field the
    later counts.

    Raises ConfigError with one line per mistake: field, value, remedy.
    """
    fields = read_fields(recipe)
    for assignment in assignments:
        set_field(fields, *parse_assignment(assignment))
    with checked(kind):
        return kind.model_validate(fields)


def read_fields(recipe: Path) -> dict[str, Any]:
    """What a YAML file says, unchecked. Raises ConfigError where it holds no fields."""
    fields = tree.parse_yaml(_read_text(recipe), f"recipe {recipe}")
    if not isinstance(fields, dict):
        there = "nothing" if fields is None else shorten_value(fields)
        raise ConfigError(
            f"recipe {recipe}: expected fields with values, found {there}; `frpo init` writes an example"
        )
    return fields


def _read_text(recipe: Path) -> str:
    try:
        with Path(os.path.expanduser(recipe)).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(
                f"recipe {recipe}: more than {MOST_BYTES:,} bytes; give a YAML file, and data by its path"
            )
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"recipe {recipe}: {error.strerror or error}; give the path of a YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"recipe {recipe}: byte {error.start + 1} is no UTF-8; save it as UTF-8 text"
        ) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to the same tree."""
    return tree.dump_yaml(config.model_dump(mode="json"))
