"""Stages done, in progress and to do, and how long they take."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median

from frpo.outline.stage import parse_stage
from frpo.watch.folder import Owner, RunFolder, StageFiles, StageRows
from frpo.watch.view import Now, StageGroup, StageNow, StageState, State

RECENT = 20
"""Steps that tell how long one takes."""
WAITING = re.compile(r"^\S+ \S+ (.*) \.\.\.$")
"""A line of run.log that says what it waits for; the next one says that it has come."""


def describe_now(run: RunFolder, now: float) -> Now:
    left = [name for name, files in run.files.items() if files.took is None]
    current = left[0] if left else ""
    state = state_of(run, left)
    rows = run.rows.get(current, StageRows())
    usual = usual_seconds(run)
    forecasts = [forecast_stage(run, name, usual.get(alike(name)), now) for name in left]
    waiting = WAITING.match(run.said[-1]) if run.said and state != "finished" else None
    known = [seconds for seconds in forecasts if seconds is not None]
    return Now(
        state=state,
        heard=run.heard,
        stage=current,
        began=run.files[current].began if current else None,
        step=rows.step,
        num_steps=run.num_steps.get(current),
        step_s=step_seconds(rows),
        waits_for=waiting.group(1) if waiting else "",
        last_words=run.said[-1] if run.said else "",
        done=len(run.files) - len(left),
        stages=len(run.files),
        left_s=sum(known) if known and state in ("running", "unknown") else None,
        unforeseen=len(forecasts) - len(known),
    )


def state_of(run: RunFolder, left: Sequence[str]) -> State:
    if run.stages and not left:
        return "finished"
    states: dict[Owner, State] = {"here": "running", "nobody": "stopped", "unknown": "unknown"}
    return states[run.owner]


def step_seconds(rows: StageRows) -> float | None:
    """Of the last steps; a pause between two, such as a validation or a resume, counts little."""
    gaps = [later - earlier for (_, earlier), (_, later) in pairwise(rows.times[-RECENT:])]
    return median(gaps) if gaps else None


def alike(name: str) -> str:
    """What stages of several arms have in common: downstream/<arm>/harsh are alike, and all rlhf/<arm>."""
    stage = parse_stage(name)
    return f"{stage.kind}/{stage.rest}"


def usual_seconds(run: RunFolder) -> dict[str, float]:
    """What stages alike took, mean over those that are done."""
    took: dict[str, list[float]] = defaultdict(list)
    for name, files in run.files.items():
        if files.took is not None:
            took[alike(name)].append(files.took)
    return {kind: fmean(seconds) for kind, seconds in took.items()}


def forecast_stage(run: RunFolder, name: str, usual: float | None, now: float) -> float | None:
    """Seconds that a stage will still take: by what stages alike took, and where it is in progress by its
    steps; the larger. None where neither is known."""
    files = run.files[name]
    if usual is not None and files.began is not None:
        usual = max(0.0, usual - (now - files.began))
    rows, num_steps = run.rows.get(name, StageRows()), run.num_steps.get(name)
    step_s = step_seconds(rows)
    by_steps = (num_steps - rows.step) * step_s if num_steps and step_s is not None else None
    known = [seconds for seconds in (usual, by_steps) if seconds is not None]
    return max(known) if known else None


def describe_stages(run: RunFolder, arms: Mapping[str, int]) -> tuple[StageGroup, ...]:
    """Arm by arm, what belongs to the base policy first."""
    current = next((name for name in run.files if run.files[name].took is None), "")
    usual = usual_seconds(run)
    groups: dict[str, list[StageNow]] = defaultdict(list)
    for name in run.files:
        stage = parse_stage(name)
        short = stage.rest if stage.kind == "downstream" else f"{stage.kind} {stage.rest}".rstrip()
        took = run.files[name].took
        now = StageNow(
            name=short,
            state=_state_of_stage(run.files[name], current=name == current),
            took_s=usual.get(alike(name)) if took is None else took,
            step=run.rows[name].step if name in run.rows else 0,
            num_steps=run.num_steps.get(name),
        )
        groups[stage.arm or stage.kind].append(now)
    return tuple(
        StageGroup(owner=owner, style=arms.get(owner), stages=tuple(stages))
        for owner, stages in groups.items()
    )


def _state_of_stage(files: StageFiles, *, current: bool) -> StageState:
    if files.took is not None:
        return "done"
    if files.began is None:
        return "to do"
    return "now" if current else "begun"
