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

from frpo.checkpoint import Checkpoints, checkpoints_in, progress_of, write_text
from frpo.config import Config, ConfigError
from frpo.content import Digests
from frpo.outline import Stage, fixed_end, outline
from frpo.records import Made, StageResult
from frpo.stages.graph import made_from

MADE, DONE = "made.json", "done.json"
TOLD = 8
"""Changes that are named one by one."""

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


def look(config: Config) -> tuple[Standing, ...]:
    """How every stage stands, in order. Writes nothing, and reads what the configuration names only where a
    stage has begun.

    Raises ConfigError for a checkpoint that this configuration's ranks cannot load.
    """
    stages = outline(config)
    if not any((config.folder / stage.name).exists() for stage in stages):
        return tuple(
            Standing(stage, Made(digest="", below="", values={}, named={}), "new") for stage in stages
        )
    return _look(config, Digests(config.folder))


def look_and_tell(config: Config, say: Callable[[str], None]) -> tuple[Standing, ...]:
    """As `look`, for a run: says what will be redone, and remembers the digests of files in the run
    folder."""
    digests = Digests(config.folder)
    found = _look(config, digests)
    digests.save()
    if told := paragraph(config, found):
        say(told)
    return found


def _look(config: Config, digests: Digests) -> tuple[Standing, ...]:
    found = tuple(_standing(config, stage, made) for stage, made in made_from(config, digests))
    for standing in found:
        _refuse_other_ranks(config, standing)
    return found


def _standing(config: Config, stage: Stage, made: Made) -> Standing:
    folder = config.folder / stage.name
    before, result, step = _read(folder / MADE, Made), _read(folder / DONE, StageResult), _newest(folder)
    if before and before.digest == made.digest:
        done = result is not None and result.inputs == made.digest
        return Standing(stage, made, "done" if done else "begun", step=step, finished=done)
    if before is None and not (result or step):
        return Standing(stage, made, "new" if not folder.exists() else "other")
    if before and step and not why_from_the_start(stage, made, before, step):
        return Standing(stage, made, "longer", before, step, result is not None)
    return Standing(stage, made, "other", before, step, result is not None)


def _read(path: Path, kind: type[R]) -> R | None:
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValueError):
        return None


def _newest(folder: Path) -> int | None:
    found = checkpoints_in(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else None


def why_from_the_start(stage: Stage, made: Made, before: Made, step: int | None) -> str:
    """Why a stage of which nothing but the number of steps has changed cannot go on from `step`; empty where it
    can, and "changed" where more than that has."""
    training = stage.training()
    field = f"{training.field}.num_steps" if training else ""
    if before.below != made.below or _different(before.values, made.values) != [field]:
        return "changed"
    if reason := fixed_end(stage):
        return reason
    if step is None:
        return "its last checkpoint is not there"
    asked: Any = made.values[field]
    return f"its checkpoint is past that, at step {step}" if step > asked else ""


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [k for k in {**before, **now} if before.get(k, _different) != now.get(k, _different)]


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
                f"checkpoint of {then}, which cannot be "
                f"loaded otherwise; set it back to {then} until the stage is done, or choose another folder "
                "(--run-dir)"
            )


# ---- words


def paragraph(config: Config, found: Sequence[Standing]) -> str:
    """What a run will redo or prolong of what lies in its folder, why, where the old results go, and how to
    keep both; empty where nothing finished or saved is touched."""
    redone = [s for s in found if s.state == "other" and (s.finished or s.step)]
    longer = [s for s in found if s.state == "longer"]
    told = list(_longer(longer))
    if redone:
        names = ", ".join(s.stage.name for s in redone)
        told.append(
            f"{len(redone)} of {len(found)} stages {'is' if len(redone) == 1 else 'are'} done again from the "
            f"start: {names}."
        )
        told += _reasons(config, redone)
    if not told:
        return ""
    if redone or any(s.finished for s in longer):
        told.append(
            "What they hold now is kept, rows of metrics.jsonl included, in a folder below "
            f"{config.folder / 'superseded'}."
        )
        told.append("To have both side by side, give this configuration a folder of its own (--run-dir).")
    return " ".join(told)


def _longer(longer: Sequence[Standing]) -> Iterator[str]:
    for s in longer:
        field = next(k for k in s.made.values if k.endswith("num_steps"))
        before = s.before.values[field] if s.before else None
        yield f"{s.stage.name} goes on after step {s.step}: {field}: {before} -> {s.made.values[field]}."


def _reasons(config: Config, redone: Sequence[Standing]) -> Iterator[str]:
    """What has changed since, each once; then the stages that are redone since they stand on others."""
    if any(s.before is None for s in redone):
        yield "They were made by a version of frpo that did not write down what counts now, so that it cannot be compared."
    lines: dict[str, None] = {}
    for s in redone:
        if s.before:
            why = why_from_the_start(s.stage, s.made, s.before, s.step)
            lines |= dict.fromkeys(
                change + (f" (from the start: {why})" if why != "changed" else "")
                for change in _changes(s.before, s.made)
            )
    if lines:
        more = f"; and {len(lines) - TOLD} more" if len(lines) > TOLD else ""
        yield f"Changed since: {'; '.join(list(lines)[:TOLD])}{more}."
    if any(s.before and s.before.below != s.made.below for s in redone):
        yield "What stands on a stage is done again with it."


def _changes(before: Made, now: Made) -> Iterator[str]:
    whole = [
        p for p in _different(before.values, now.values) if before.values.get(p, now.values.get(p)) is None
    ]
    for path in _different(before.values, now.values):
        old, new = before.named.get(path), now.named.get(path)
        if any(path.startswith(f"{section}.") for section in whole):
            continue  # a section that is there now, or is not any more: said once
        if old and new and old == new:
            yield f"{path}: the content of {new} is another"
        elif old and new:
            yield f"{path}: {old} -> {new}, which holds something else"
        else:
            yield f"{path}: {_short(before, path)} -> {_short(now, path)}"


def _short(made: Made, path: str) -> str:
    if path not in made.values:
        return "given" if any(p.startswith(f"{path}.") for p in made.values) else "not there"
    text = json.dumps(made.named.get(path, made.values[path]), ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- deeds


class Log(Protocol):
    """What a run writes down beside its stages' folders."""

    def note(self, text: str) -> None: ...
    def put_aside(self, superseded: Collection[str], prolonged: Collection[str], folder: Path) -> None:
        """Move what it holds of superseded stages to a folder; copy what it holds of prolonged ones."""


def supersede(config: Config, found: Sequence[Standing], log: Log) -> None:
    """Put aside what was made from other inputs, into one folder below superseded/. What goes on leaves its
    checkpoints."""
    other = [s for s in found if s.state == "other"]
    longer = [s for s in found if s.state == "longer" and s.finished]
    if not (other or longer):
        return
    names, prolonged = [s.stage.name for s in other], [s.stage.name for s in longer]
    aside = _new_aside(config.folder)
    log.put_aside(
        names, prolonged, aside
    )  # first the rows: a folder that still stands is put aside by the next call
    for s in sorted(other, key=lambda s: -len(s.stage.name)):  # harness/<arm>/<task> lies in harness/<arm>
        folder = config.folder / s.stage.name
        _move([*folder.iterdir()], aside / s.stage.name)
        folder.rmdir()
    for s in longer:
        folder = config.folder / s.stage.name
        _move([p for p in (folder / "policy", folder / DONE) if p.exists()], aside / s.stage.name)
        write_text(aside / s.stage.name / MADE, (folder / MADE).read_text())
    log.note(f"Put aside in {aside}: {', '.join([*names, *prolonged])}")


def _new_aside(run: Path) -> Path:
    """Not there yet."""
    first = run / "superseded" / time.strftime("%Y%m%d-%H%M%S")
    names = (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([first], names) if not p.exists())


def _move(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.rename(folder / path.name)


def begin(run: Path, standing: Standing) -> Path:
    """The stage's folder, with what it is made from."""
    folder = run / standing.stage.name
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MADE, standing.made.model_dump_json(indent=1))
    return folder


def finish(folder: Path, made: Made, result: StageResult, *, keep_last: bool) -> None:
    """Write the result with what it was made from. Of the checkpoints the newest is kept where the stage
    could go on from it."""
    write_text(folder / DONE, result.model_copy(update={"inputs": made.digest}).model_dump_json(indent=1))
    Checkpoints(folder / "checkpoints", 1, 0).clear(but_newest=keep_last)
