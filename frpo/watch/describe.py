"""From what a run folder holds to what the page says of it. Pure but for the clock that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean

from frpo.outline.stage import BASE, parse_stage
from frpo.records import Estimate, Evaluation
from frpo.stats import StepMetrics
from frpo.watch.drawing import NUM_STYLES, Line, LivePanel, Point, draw_panel
from frpo.watch.folder import RunFolder, SampleRow, StageRows
from frpo.watch.stages import describe_now, describe_stages
from frpo.watch.view import (
    ArmNow,
    ArmPhases,
    HeldoutRow,
    MeasuredArm,
    PhaseShare,
    RunView,
    Said,
    SaidOfPrompt,
)

RECENT = 10
"""Steps whose mean is an arm's number of now."""
TIMED = 100
"""Steps whose mean is what an arm's step takes."""
PLANE_POINTS = 12
"""Of an arm's way through the plane: single steps would hide it."""
MOST_PROMPTS = 8
MOST_ANSWERS = 24
"""Of a prompt, the last."""
MISSING = "–"

CURVES: tuple[tuple[str, Callable[[StepMetrics], float | None]], ...] = (
    ("reward", lambda row: row.batch.reward),
    ("KL to the reference, nats", lambda row: row.update.kl),
    ("share of groups without signal", lambda row: row.batch.equal_groups),
    ("share of completions cut", lambda row: row.batch.cut_share),
    ("entropy, nats a token", lambda row: row.update.entropy),
    ("length, tokens", lambda row: row.batch.length),
)


def describe_run(run: RunFolder, now: float) -> RunView:
    """`now`: seconds since 1970."""
    arms = {arm: place % NUM_STYLES for place, arm in enumerate(arms_of(run))}
    trained = [arm for arm in arms if _trained(run, arm).times]
    shown = {arm: arms[arm] for arm in trained[-NUM_STYLES:]}
    return RunView(
        name=run.config.name if run.config else run.path.name,
        folder=str(run.path),
        seed=run.config.seed if run.config else None,
        now=describe_now(run, now),
        warnings=tuple(_list_warnings(run)),
        arms=tuple(_describe_arm(run, arm, arms[arm]) for arm in trained),
        curves=tuple(_draw_curves(run, shown)),
        plane=_draw_plane(run, shown),
        stages=describe_stages(run, arms),
        phases=tuple(_describe_phases(run, trained)),
        measured=tuple(_describe_measured(run, arms)),
        drawn=tuple(_group_by_prompt(list(reversed(run.drawn)), arms)),
        samples=_describe_samples(run.samples, arms),
        log=tuple(run.said),
    )


def arms_of(run: RunFolder) -> list[str]:
    """Their names, in order; "base" alone where nothing is trained for a reward."""
    if run.config:
        return [arm.name for arm in run.config.arms] or [BASE]
    return list(dict.fromkeys(filter(None, (parse_stage(name).arm for name in run.files))))


def _trained(run: RunFolder, arm: str) -> StageRows:
    return run.rows.get(f"rlhf/{arm}", StageRows())


def _list_warnings(run: RunFolder) -> Iterator[str]:
    if run.problem:
        yield f"{run.problem} (what is to do is not known here)"
    if run.unread:
        yield f"{run.unread} rows were written by another version of frpo, and are left out here"
    for stage, rows in run.rows.items():
        for text in rows.warnings:
            yield f"{stage} {text}"


# ---- arms side by side; `arms` are their styles by name


def _describe_arm(run: RunFolder, arm: str, style: int) -> ArmNow:
    rows = _trained(run, arm)
    recent = rows.steps[-RECENT:]

    def mean(read: Callable[[StepMetrics], float | None]) -> float | None:
        known = [value for value in map(read, recent) if value is not None]
        return fmean(known) if known else None

    reward, kl, equal, cut, entropy, length = (mean(read) for _, read in CURVES)
    return ArmNow(
        name=arm,
        style=style,
        step=rows.step,
        num_steps=run.num_steps.get(f"rlhf/{arm}"),
        reward=reward,
        kl=kl,
        without_signal=equal,
        cut=cut,
        entropy=entropy,
        length=length,
    )


def _draw_curves(run: RunFolder, arms: Mapping[str, int]) -> Iterator[LivePanel]:
    for title, read in CURVES:
        lines = []
        for arm, style in arms.items():
            points = [(row.step, read(row)) for row in _trained(run, arm).steps]
            lines.append(Line(name=arm, style=style, points=known_points(points)))
        if panel := draw_panel(title, "steps", lines):
            yield panel
    if panel := _draw_finetune(run, arms):
        yield panel


def known_points(points: Sequence[tuple[float, float | None]]) -> list[Point]:
    return [(x, y) for x, y in points if y is not None]


def _draw_finetune(run: RunFolder, arms: Mapping[str, int]) -> LivePanel | None:
    """The stage beside the arms' own training that wrote last, and the same of the other arms."""
    others = [name for name, rows in run.rows.items() if rows.times and not name.startswith("rlhf/")]
    if not others:
        return None
    last = parse_stage(max(others, key=lambda name: run.rows[name].times[-1][1]))
    kind, task = last.kind, last.rest
    lines = []
    for arm, style in (arms if task else {kind: 0}).items():
        rows = run.rows.get(f"{kind}/{arm}/{task}" if task else kind, StageRows())
        points = [(row.step, row.batch.reward) for row in rows.steps] or rows.losses
        lines.append(Line(name=arm, style=style, points=known_points(points)))
    by_loop = any(run.rows[name].steps for name in others if name.endswith(f"/{task}"))
    what = "reward" if by_loop else "loss, nats a token"
    return draw_panel(f"{kind} {task}".rstrip() + f": {what}", "steps", lines)


def _draw_plane(run: RunFolder, arms: Mapping[str, int]) -> LivePanel | None:
    lines = []
    for arm, style in arms.items():
        points = []
        for bucket in _split(_trained(run, arm).steps, PLANE_POINTS):
            known = [(row.update.kl, row.batch.reward) for row in bucket]
            kls = [kl for kl, _ in known if kl is not None]
            rewards = [reward for _, reward in known if reward is not None]
            if kls and rewards:
                points.append((fmean(kls), fmean(rewards)))
        lines.append(Line(name=arm, style=style, points=points))
    return draw_panel("reward over KL", "KL to the reference, nats per completion", lines)


def _split(rows: Sequence[StepMetrics], parts: int) -> Iterator[Sequence[StepMetrics]]:
    """Neighbours, in at most `parts` equal parts; the last may be shorter."""
    width = -(-len(rows) // parts)
    for first in range(0, len(rows), width or 1):
        yield rows[first : first + width]


def _describe_phases(run: RunFolder, arms: Sequence[str]) -> Iterator[ArmPhases]:
    of_arms = {arm: _trained(run, arm).steps[-TIMED:] for arm in arms}
    longest = max((fmean(row.phases.step_s for row in rows) for rows in of_arms.values() if rows), default=1)
    for arm, rows in of_arms.items():
        if not rows:
            continue
        seconds = {
            "generate": fmean(row.phases.generate_s for row in rows),
            "score": fmean(row.phases.score_s for row in rows),
            "update": fmean(row.phases.update_s for row in rows),
            "publish": fmean(row.phases.publish_s for row in rows),
            "other": fmean(row.phases.other_s for row in rows),
        }
        phases = [
            PhaseShare(name=name, seconds=value, share=value / longest) for name, value in seconds.items()
        ]
        tokens = sum(row.batch.num_tokens for row in rows) / sum(row.phases.step_s for row in rows)
        step_s = sum(seconds.values())
        yield ArmPhases(name=arm, step_s=step_s, tokens_per_s=tokens, phases=tuple(phases))


# ---- policies


def _describe_measured(run: RunFolder, arms: Mapping[str, int]) -> Iterator[MeasuredArm]:
    """The last measurement of every stage, arm by arm."""
    measured = [name for name in run.files if name in run.rows and run.rows[name].evaluations]
    of_arms: dict[str, list[Evaluation]] = {}
    for name in measured:
        last = run.rows[name].evaluations[-1]
        of_arms.setdefault(last.arm, []).append(last)
    for arm, evaluations in of_arms.items():
        tasks: dict[str, None] = {}
        for evaluation in evaluations:
            tasks |= {reward.task: None for reward in evaluation.rewards}
        policies = [
            HeldoutRow(
                policy=_name_policy(evaluation),
                kl=_format_estimate(evaluation.kl_reference),
                rewards=tuple(_format_reward(evaluation, task) for task in tasks),
            )
            for evaluation in evaluations
        ]
        yield MeasuredArm(owner=arm, style=arms.get(arm), tasks=tuple(tasks), policies=tuple(policies))


def _name_policy(evaluation: Evaluation) -> str:
    if not evaluation.downstream:
        return "itself"
    return f"after {evaluation.downstream}, step {evaluation.step}"


def _format_reward(evaluation: Evaluation, task: str) -> str:
    return _format_estimate(next((of.reward for of in evaluation.rewards if of.task == task), None))


def _format_estimate(value: Estimate | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _describe_samples(rows: Sequence[SampleRow], arms: Mapping[str, int]) -> tuple[SaidOfPrompt, ...]:
    """The prompts that were answered last, each with all its answers."""
    last = dict.fromkeys((row.task, row.prompt) for row in reversed(rows))
    spread = list(last)[:: max(1, len(last) // MOST_PROMPTS)][:MOST_PROMPTS]
    of_prompts: list[SaidOfPrompt] = []
    for key in reversed(spread):
        answers = [row for row in rows if (row.task, row.prompt) == key][-MOST_ANSWERS:]
        of_prompts += _group_by_prompt(answers, arms)
    return tuple(of_prompts)


def _group_by_prompt(rows: Sequence[SampleRow], arms: Mapping[str, int]) -> Iterator[SaidOfPrompt]:
    """Neighbours of one prompt and, for those of training, of one step."""
    for (task, prompt), answers in groupby(rows, key=lambda row: (row.task, row.prompt)):
        said = tuple(_describe_sample(row, arms) for row in answers)
        yield SaidOfPrompt(task=task, prompt=prompt, answers=said)


def _describe_sample(row: SampleRow, arms: Mapping[str, int]) -> Said:
    stage = parse_stage(row.stage)
    who = stage.arm or stage.kind
    if stage.rest:
        who += f" in {stage.rest}" if stage.kind == "downstream" else f" under {stage.kind} {stage.rest}"
    return Said(
        who=f"{who}, step {row.step}",
        style=arms.get(stage.arm),
        completion=row.completion,
        reward=row.reward,
    )
