"""What the folders of a run's stages hold beside what the configuration asks for: finished, begun, or made
from something else. Says in words what will be redone and why, and puts what is superseded aside. Deletes
nothing.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from frpo.checkpoint import Checkpoints, checkpoints_in, progress_of
from frpo.config import Config, ConfigError
from frpo.content import Digests
from frpo.disk import write_text
from frpo.outline import Stage, fixed_end, list_stages
from frpo.records import Made, StageResult
from frpo.stages.graph import made_from

MADE = "made.json"
DONE = "done.json"
TOLD = 8
"""Changes that are named one by one."""
LONGEST_VALUE = 60
"""Of a value in such a change, characters."""

R = TypeVar("R", Made, StageResult)
State = Literal["new", "begun", "done", "longer", "other"]


@dataclass(frozen=True)
class Standing:
    """One stage, and what lies in its folder."""

    stage: Stage
    made: Made
    """What the configuration makes it from."""
    state: State
    """new: nothing yet. begun, done: from these inputs. longer: it has fewer steps than asked for, and goes
    on. other: from other inputs; it is put aside and redone."""
    before: Made | None = None
    """What the folder's content was made from, where that is known and differs."""
    step: int | None = None
    """Of the newest checkpoint."""
    finished: bool = False
    """Whether the folder holds a result, whatever it was made from."""


def look_at_stages(config: Config) -> tuple[Standing, ...]:
    """How every stage stands, in order. Writes nothing, and reads what the configuration names only where a
    stage has begun.

    Raises ConfigError for a checkpoint that this configuration's ranks cannot load.
    """
    stages = list_stages(config)
    if not any((config.folder / stage.name).exists() for stage in stages):
        nothing = Made(digest="", below="", values={}, named={})
        return tuple(Standing(stage, nothing, "new") for stage in stages)
    return _look_at_all(config, Digests(config.folder))


def look_and_tell(config: Config, say: Callable[[str], None]) -> tuple[Standing, ...]:
    """As `look`, for a run: says what will be redone, and remembers the digests of files in the run
    folder."""
    digests = Digests(config.folder)
    standings = _look_at_all(config, digests)
    digests.save()
    told = describe_changes(config, standings)
    if told:
        say(told)
    return standings


def _look_at_all(config: Config, digests: Digests) -> tuple[Standing, ...]:
    standings = tuple(_look_at(config, stage, made) for stage, made in made_from(config, digests))
    for standing in standings:
        _refuse_other_ranks(config, standing)
    return standings


def _look_at(config: Config, stage: Stage, made: Made) -> Standing:
    folder = config.folder / stage.name
    before = _read_record(folder / MADE, Made)
    result = _read_record(folder / DONE, StageResult)
    step = _find_newest_step(folder)
    if before and before.digest == made.digest:
        if result and result.inputs == made.digest:
            return Standing(stage, made, "done", step=step, finished=True)
        return Standing(stage, made, "begun", step=step)
    if not (before or result or step):
        return Standing(stage, made, "other" if folder.exists() else "new")
    goes_on = before and step and not why_from_the_start(stage, made, before, step)
    return Standing(stage, made, "longer" if goes_on else "other", before, step, result is not None)


def _read_record(path: Path, kind: type[R]) -> R | None:
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValueError):
        return None


def _find_newest_step(folder: Path) -> int | None:
    """Of its newest checkpoint."""
    checkpoints = checkpoints_in(folder / "checkpoints")
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else None


def why_from_the_start(stage: Stage, made: Made, before: Made, step: int | None) -> str:
    """Why a stage of which nothing but the number of steps has changed cannot go on from `step`; empty where
    it can, and "changed" where more than that has."""
    training = stage.training()
    field = f"{training.field}.num_steps" if training else ""
    if before.below != made.below or _find_changed_paths(before.values, made.values) != [field]:
        return "changed"
    if reason := fixed_end(stage):
        return reason
    if step is None:
        return "its last checkpoint is not there"
    asked: Any = made.values[field]
    return f"its checkpoint is past that, at step {step}" if step > asked else ""


def _find_changed_paths(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has another value now, is new, or is gone."""
    gone = object()
    return [path for path in {**before, **now} if before.get(path, gone) != now.get(path, gone)]


def _refuse_other_ranks(config: Config, standing: Standing) -> None:
    """DeepSpeed's checkpoints are sharded: other ranks, or another stage of ZeRO, cannot load them."""
    training = standing.stage.training()
    if standing.state not in ("begun", "longer") or not (standing.step and training):
        return
    saved = progress_of(config.folder / standing.stage.name / "checkpoints" / f"step-{standing.step:08d}")
    if saved is None:
        return  # torn: an older one is taken
    for name, value, then in (
        ("learner.num_workers", config.learner.num_workers, saved.num_workers),
        (f"{training.field}.zero_stage", training.settings.zero_stage, saved.zero_stage),
    ):
        if then is not None and then != value:
            raise ConfigError(
                f"{name}: {value}, but {standing.stage.name} was left at step {standing.step} by a "
                f"checkpoint of {then}, which cannot be loaded otherwise; set it back to {then} until the "
                "stage is done, or choose another folder (--run-dir)"
            )


# ---- words


def describe_changes(config: Config, standings: Sequence[Standing]) -> str:
    """What a run will redo or prolong of what lies in its folder, why, where the old results go, and how to
    keep both; empty where nothing finished or saved is touched."""
    redone = [s for s in standings if s.state == "other" and (s.finished or s.step)]
    longer = [s for s in standings if s.state == "longer"]
    if not (redone or longer):
        return ""
    told = [_say_longer(standing) for standing in longer]
    if redone:
        names = ", ".join(standing.stage.name for standing in redone)
        are = "is" if len(redone) == 1 else "are"
        told.append(f"{len(redone)} of {len(standings)} stages {are} done again from the start: {names}.")
        told += _say_why(redone)
    if redone or any(standing.finished for standing in longer):
        told.append(
            "What they hold now is kept, rows of metrics.jsonl included, in a folder below "
            f"{config.folder / 'superseded'}."
        )
        told.append("To have both side by side, give this configuration a folder of its own (--run-dir).")
    return " ".join(told)


def _say_longer(standing: Standing) -> str:
    values = standing.made.values
    field = next(path for path in values if path.endswith("num_steps"))
    before = standing.before.values[field] if standing.before else None
    return f"{standing.stage.name} goes on after step {standing.step}: {field}: {before} -> {values[field]}."


def _say_why(redone: Sequence[Standing]) -> Iterator[str]:
    """What has changed since, each once; then the stages that are redone since they stand on others."""
    compared = [(s, s.before) for s in redone if s.before]
    if len(compared) < len(redone):
        yield (
            "They were made by a version of frpo that did not write down what counts now, so that it cannot "
            "be compared."
        )
    lines: dict[str, None] = {}  # in order, each once
    for standing, before in compared:
        why = why_from_the_start(standing.stage, standing.made, before, standing.step)
        behind = "" if why == "changed" else f" (from the start: {why})"
        for change in _say_changes(before, standing.made):
            lines[change + behind] = None
    if lines:
        more = f"; and {len(lines) - TOLD} more" if len(lines) > TOLD else ""
        yield f"Changed since: {'; '.join(list(lines)[:TOLD])}{more}."
    if any(before.below != standing.made.below for standing, before in compared):
        yield "What stands on a stage is done again with it."


def _say_changes(before: Made, now: Made) -> Iterator[str]:
    paths = _find_changed_paths(before.values, now.values)
    # a section that is there now, or is not any more, is said once, without its fields
    sections = [path for path in paths if before.values.get(path, now.values.get(path)) is None]
    for path in paths:
        if any(path.startswith(f"{section}.") for section in sections):
            continue
        old, new = before.named.get(path), now.named.get(path)
        if not (old and new):
            yield f"{path}: {_shorten_value(before, path)} -> {_shorten_value(now, path)}"
        elif old == new:
            yield f"{path}: the content of {new} is another"
        else:
            yield f"{path}: {old} -> {new}, which holds something else"


def _shorten_value(made: Made, path: str) -> str:
    if path not in made.values:
        below = any(other.startswith(f"{path}.") for other in made.values)
        return "given" if below else "not there"
    text = json.dumps(made.named.get(path, made.values[path]), ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


# ---- deeds


class Log(Protocol):
    """What a run writes down beside its stages' folders."""

    def note(self, text: str) -> None: ...
    def put_aside(self, superseded: Collection[str], prolonged: Collection[str], folder: Path) -> None:
        """Move what it holds of superseded stages to a folder; copy what it holds of prolonged ones."""


def supersede(config: Config, standings: Sequence[Standing], log: Log) -> None:
    """Put aside what was made from other inputs, into one folder below superseded/. What goes on leaves its
    checkpoints."""
    other = [s.stage.name for s in standings if s.state == "other"]
    longer = [s.stage.name for s in standings if s.state == "longer" and s.finished]
    if not (other or longer):
        return
    aside = _choose_aside(config.folder)
    # first the rows: a folder that still stands is put aside by the next call
    log.put_aside(other, longer, aside)
    # the longest names first: harness/<arm>/<task> lies in harness/<arm>
    for name in sorted(other, key=len, reverse=True):
        folder = config.folder / name
        _move(list(folder.iterdir()), aside / name)
        folder.rmdir()
    for name in longer:
        folder = config.folder / name
        _move([path for path in (folder / "policy", folder / DONE) if path.exists()], aside / name)
        write_text(aside / name / MADE, (folder / MADE).read_text())
    log.note(f"Put aside in {aside}: {', '.join([*other, *longer])}")


def _choose_aside(run: Path) -> Path:
    """Not there yet."""
    first = run / "superseded" / time.strftime("%Y%m%d-%H%M%S")
    names = (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([first], names) if not p.exists())


def _move(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.rename(folder / path.name)


def begin_stage(run: Path, standing: Standing) -> Path:
    """The stage's folder, with what it is made from."""
    folder = run / standing.stage.name
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MADE, standing.made.model_dump_json(indent=1))
    return folder


def finish_stage(folder: Path, made: Made, result: StageResult, *, keep_last: bool) -> None:
    """Write the result with what it was made from. Of the checkpoints the newest is kept where the stage
    could go on from it."""
    write_text(folder / DONE, result.model_copy(update={"inputs": made.digest}).model_dump_json(indent=1))
    Checkpoints(folder / "checkpoints", 1).clear(but_newest=keep_last)
