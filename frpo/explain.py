"""Prints a configuration and a plan for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table

from frpo import models, testbed, tree
from frpo.config import Config, DatasetConfig, Missing
from frpo.data_checks import Checked
from frpo.disk import write_text
from frpo.forecast import (
    Need,
    Phase,
    estimate_judges_on_cards,
    estimate_needs,
    estimate_phases,
    sum_host_gib,
    sum_step_seconds,
)
from frpo.outline import Heldout
from frpo.planning import Plan, plan_run
from frpo.preflight import check_run
from frpo.records import to_lines
from frpo.resources import (
    disk_bytes,
    estimate_host,
    find_card,
    list_missing_resources,
    read_judges,
    read_shape,
)
from frpo.rewards.pool import POOL_MIB, pool_processes
from frpo.sources import Row, read_dataset
from frpo.stages.folders import Standing, describe_changes, look_at_stages


def explain_config(config: Config) -> str:
    """The resolved configuration as YAML, each field with its meaning and default as a comment; `load` reads
    it back."""
    return "\n".join(_section_lines(config, 0))


def _section_lines(section: BaseModel, depth: int) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        lines += _field_lines(name, getattr(section, name), field, depth)
    return lines


def _field_lines(name: str, value: Any, field: FieldInfo, depth: int) -> list[str]:
    pad = "  " * depth
    comment = f"# {' '.join((field.description or '').split())}"
    if isinstance(value, BaseModel):
        return [f"{pad}{name}:  {comment}", *_section_lines(value, depth + 1)]
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        lines = [f"{pad}{name}:  {comment}"]
        for item in value:
            first, *rest = _section_lines(item, depth + 2)
            lines += [f"{pad}  - {first.strip()}", *rest]
        return lines
    default = ""
    if not field.is_required():
        default = f" [default {_dump_inline(field.get_default(call_default_factory=True))}]"
    return [f"{pad}{name}: {_dump_inline(value)}  {comment}{default}"]


def _dump_inline(value: Any) -> str:
    """YAML on one line."""
    if value is PydanticUndefined:
        return "none"
    if isinstance(value, BaseModel):
        return "its fields' defaults"
    if isinstance(value, tuple):
        value = list(value)
    elif value is not None and not isinstance(value, str | int | float | bool | dict | list):
        value = str(value)  # a path
    text = tree.dump_yaml(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def print_plan(config: Config, console: Console) -> bool:
    """Actors, sizes and stages, and what a run here would redo; then what is missing here. Touches nothing,
    downloads nothing. Whether nothing is missing.

    Raises ConfigError for a configuration that is wrong.
    """
    config, uncached = models.find_cached_models(config)
    missing = [str(error) for error in uncached]
    checked: Checked | None = None
    heldout: Heldout | None = None
    try:
        checked = check_run(config)
        heldout = count_heldout(config)
    except Missing as error:
        missing += str(error).splitlines()
    asked = plan_run(config, heldout)
    standings = look_at_stages(config)
    missing = list_missing_resources(config, asked) + missing
    console.print(_tabulate_actors(asked))
    _print_step(config, console)
    console.print(_tabulate_stages(asked, standings))
    for table in _forecast_tables(config, asked):
        console.print(table)
    written = disk_bytes(config)
    if written:
        _print_line(console, f"Disk: at most {written / 2**30:.1f} GiB in the run folder")
    drawn = f"at most {asked.max_tokens:,}{_name_uncounted(asked)}"
    _print_line(console, f"Completion tokens drawn: {drawn}")
    if checked:
        rows = f"{checked.rows:,} rows read, none wrong" if checked.rows else "embedded"
        _print_line(console, f"Data: {rows}")
        for note in checked.notes:
            _print_line(console, f"Note: {note}")
    redone = describe_changes(config, standings)
    if redone:
        _print_line(console, redone)
    for line in missing:
        _print_line(console, f"Missing {line}")
    if not missing:
        _print_line(console, "Nothing is missing.")
    return not missing


def _print_step(config: Config, console: Console) -> None:
    """How much is drawn in a step, and the processes that score it."""
    prompts = config.rollout.prompts_per_step
    k = config.rollout.group_size
    _print_line(
        console,
        f"One step: {prompts} prompts x {k} completions = {prompts * k} completions of at most "
        f"{config.rollout.max_new_tokens} tokens; prompts of at most {config.data.max_prompt_tokens} tokens",
    )
    processes = pool_processes(config.rewards)
    if processes:
        _print_line(
            console,
            f"Each reward actor runs its functions in {processes} processes: {POOL_MIB} MiB, and what the "
            "functions import",
        )


def count_heldout(config: Config) -> Heldout:
    """Read the held-out rows, and of the training rows the tasks; without arms every task counts as
    trained."""
    rows: Counter[str] = Counter()
    trained: set[str] = set()
    with TemporaryDirectory() as folder:
        for source in config.data.heldout:
            rows.update(row.task for row in _read_source(source, config.seed, Path(folder)))
        for source in config.data.train:
            if source.task:
                trained.add(source.task)
            else:
                trained.update(row.task for row in _read_source(source, config.seed, Path(folder)))
    if not config.arms:
        trained = set(rows)
    most = config.evaluate.max_prompts
    kept = {task: min(count, most or count) for task, count in rows.items()}
    return Heldout(sum(kept.values()), sum(count for task, count in kept.items() if task in trained))


def _read_source(source: DatasetConfig, seed: int, folder: Path) -> Iterator[Row]:
    if source.path.startswith("testbed:"):
        file = folder / "rows.jsonl"
        write_text(file, to_lines(testbed.rows_behind(source.path, seed)))
        source = source.model_copy(update={"path": str(file)})
    return read_dataset(source)


def _name_uncounted(asked: Plan) -> str:
    unknown = [stage.name for stage in asked.stages if stage.measured is None]
    if len(unknown) == len(asked.stages):
        return ", and what is drawn to measure"
    return ", and what the benchmarks draw" if unknown else ""


def _print_line(console: Console, text: str) -> None:
    """A line that may hold a user's text, which is no markup."""
    console.print(text, markup=False, soft_wrap=True)


def _tabulate_actors(asked: Plan) -> Table:
    table = Table(
        "role",
        "actors",
        "CPUs each",
        "GPUs each",
        title=f"Actors: {asked.num_cpus:g} CPUs, {asked.num_gpus:g} GPUs",
    )
    for actor in asked.actors:
        table.add_row(actor.role, str(actor.count), f"{actor.num_cpus:g}", f"{actor.num_gpus:g}")
    return table


def _tabulate_host_memory(needs: Sequence[Need], asked: Plan) -> Table:
    """Host memory by role, and of all together."""
    counts = {actor.role: actor.count for actor in asked.actors}
    table = Table("role", "actors", "GiB each", "for", title="Host memory, without reward models")
    for need in needs:
        lines = ", ".join(f"{name} {gib:.1f}" for name, gib in need.lines if gib >= 0.05)
        table.add_row(
            need.role, str(counts[need.role]), f"{need.gib:.1f}", lines, end_section=need is needs[-1]
        )
    table.add_row(
        "together",
        "",
        f"{sum_host_gib(needs, asked):.1f}",
        "learner and finetune in turn; and the object store",
    )
    return table


def _forecast_tables(config: Config, asked: Plan) -> Iterator[Table | str]:
    """Memory by role, and seconds of a step by phase, where the model's config.json is here and the card is
    known."""
    here = find_card(config)
    sizes = read_shape(config)
    if sizes:
        yield _tabulate_host_memory(estimate_host(config, sizes, asked), asked)
    if asked.num_gpus == 0:
        return
    if here is None:
        yield "Memory and time: not predicted, the card is not known (cluster.gpu)"
        return
    if sizes is None:
        yield "Memory and time: not predicted, config.json is not here"
        return
    in_turn = ", in turn" if config.rollout.sleep else ""
    title = f"Memory of an {here.name}, GiB of {here.gib:g}{in_turn}"
    needs = estimate_needs(config, sizes, here, asked)
    yield _tabulate_gpu_memory([*needs, *estimate_judges_on_cards(read_judges(config), here)], title)
    if not config.arms:
        return
    arm = max(config.arms, key=lambda arm: arm.learner.num_steps)
    phases = tuple(estimate_phases(config, arm.learner, sizes, here, asked))
    ahead = config.rollout.staleness > 0
    seconds = sum_step_seconds(phases, shared=config.rollout.sleep, ahead=ahead)
    yield _tabulate_phases(phases, seconds)
    steps = sum(arm.learner.num_steps for arm in config.arms)
    yield (
        f"All arms: {steps:,} steps, {steps * seconds / 3600:.1f} hours at most; rewards, evaluations and "
        "fine-tunes come on top"
    )


def _tabulate_gpu_memory(needs: Iterable[Need], title: str) -> Table:
    """By role, of one card."""
    table = Table("role", "", "GiB", title=title)
    for need in needs:
        for i, (name, gib) in enumerate(need.lines):
            table.add_row(need.role if i == 0 else "", name, f"{gib:.1f}")
        table.add_row("", "together", f"{need.gib:.1f}", end_section=True)
    return table


def _tabulate_phases(phases: Sequence[Phase], seconds: float) -> Table:
    table = Table("phase", "seconds", title="One step, if every completion is as long as it may be")
    for phase in phases:
        table.add_row(phase.name, f"{phase.seconds:.1f}")
    table.add_row("step", f"{seconds:.1f}")
    return table


STATES = {"new": "", "begun": "goes on", "done": "done", "longer": "goes on", "other": "again"}


def _tabulate_stages(asked: Plan, standings: Sequence[Standing]) -> Table:
    """What the completions are drawn for: to train on, and to measure with."""
    table = Table(
        "stage",
        "updates",
        "trained on",
        "measured by",
        "here",
        title="Stages, and the completions that they draw",
    )
    table.columns[0].overflow = "fold"
    for size, standing in zip(asked.stages, standings, strict=True):
        measured = "not known" if size.measured is None else f"{size.measured:,}"
        table.add_row(size.name, f"{size.updates:,}", f"{size.trained:,}", measured, STATES[standing.state])
    return table
