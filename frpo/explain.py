"""Prints a configuration and a plan for a person."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table

from frpo import models, tree
from frpo.config import Config
from frpo.planning import Plan, plan
from frpo.preflight import check, lacks
from frpo.rewards.pool import POOL_MIB, pool_processes


def explained(config: Config) -> str:
    """The resolved configuration as YAML, each field with its meaning and default as a comment; `load` reads it back."""
    return "\n".join(_lines(config, 0))


def _lines(section: BaseModel, depth: int) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        lines += _field(name, getattr(section, name), field, depth)
    return lines


def _field(name: str, value: Any, field: FieldInfo, depth: int) -> list[str]:
    pad, comment = "  " * depth, f"# {' '.join((field.description or '').split())}"
    if isinstance(value, BaseModel):
        return [f"{pad}{name}:  {comment}", *_lines(value, depth + 1)]
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        lines = [f"{pad}{name}:  {comment}"]
        for item in value:
            first, *rest = _lines(item, depth + 2)
            lines += [f"{pad}  - {first.strip()}", *rest]
        return lines
    default = "" if field.is_required() else f" [default {_yaml(field.get_default(call_default_factory=True))}]"
    return [f"{pad}{name}: {_yaml(value)}  {comment}{default}"]


def _yaml(value: Any) -> str:
    if value is PydanticUndefined:
        return "none"
    if isinstance(value, BaseModel):
        return "its fields' defaults"
    plain = (
        list(value)
        if isinstance(value, tuple)
        else str(value)
        if value is not None and not isinstance(value, str | int | float | bool | dict | list)
        else value
    )
    text = tree.dump(plain, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def print_plan(config: Config, console: Console) -> None:
    """Actors, sizes and stages; then what is missing. Raises ConfigError for a configuration that cannot run anywhere."""
    config, uncached = models.cached(config)
    asked = plan(config)
    console.print(_actors(asked))
    prompts, k = config.rollout.prompts_per_step, config.rollout.group_size
    console.print(
        f"One step: {prompts} prompts x {k} completions = {prompts * k} completions of at most "
        f"{config.rollout.max_new_tokens} tokens; prompts of at most {config.data.max_prompt_tokens} tokens"
    )
    if processes := pool_processes(config.rewards):
        console.print(f"Each reward actor runs its functions in {processes} processes: {POOL_MIB} MiB, and what the functions import")
    console.print(_stages(config, asked))
    console.print(f"Completion tokens drawn by the rlhf stages: at most {asked.max_tokens:,}")
    missing = [*map(str, uncached), *lacks(config, asked)]
    try:
        found = check(config)
        _say(console, f"Data: {found.rows:,} rows read, none wrong" if found.rows else "Data: embedded")
        for note in found.notes:
            _say(console, f"Note: {note}")
    except ValueError as error:
        missing.append(str(error))
    for line in missing:
        _say(console, f"Missing {line}")
    if not missing:
        console.print("Nothing is missing.")


def _say(console: Console, text: str) -> None:
    """A line that may hold a user's text, which is no markup."""
    console.print(text, markup=False, soft_wrap=True)


def _actors(asked: Plan) -> Table:
    table = Table("role", "actors", "CPUs each", "GPUs each", title=f"Actors: {asked.num_cpus:g} CPUs, {asked.num_gpus:g} GPUs")
    for actor in asked.actors:
        table.add_row(actor.role, str(actor.count), f"{actor.num_cpus:g}", f"{actor.num_gpus:g}")
    return table


def _stages(config: Config, asked: Plan) -> Table:
    table = Table("stage", "updates", "prompts", "completions", title="Stages")
    for stage in asked.stages:
        table.add_row(stage.name, str(stage.updates), str(stage.completions // config.rollout.group_size), str(stage.completions))
    return table
