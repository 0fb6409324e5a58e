"""The arms of a run as its report has them: what trained them in words, and what they kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from frpo.config import ObjectiveConfig
from frpo.estimators import describe_estimator
from frpo.outline.stage import BASE
from frpo.recipe import checked
from frpo.records import ArmSummary, Evaluation, StageResult
from frpo.report.lookup import task_measured, task_reward
from frpo.report.schema import Arm, Kept

NAMED = {"estimator", "beta", "target_kl", "penalty", "gate", "beta_of"}
"""Fields of the objective that stand in an arm's settings anyhow."""


def read_arm(
    arm: dict[str, Any],
    config: dict[str, Any],
    results: dict[str, StageResult],
    tasks: Sequence[str],
    finetunes: Sequence[str],
) -> Arm:
    name = str(arm["name"])
    result = results[f"rlhf/{name}"]
    assert result.arm is not None
    start = result.evaluations[0]
    with checked(ObjectiveConfig):
        objective = ObjectiveConfig.model_validate(arm["objective"])
    unlike = "".join(f", {words}" for words in _fields_unlike_the_run(arm, config))
    settings, family = (f"{words}{unlike}" for words in settings_of(objective))
    return Arm(
        name=name,
        settings=settings,
        family=family,
        penalty=describe_penalty(objective),
        beta=objective.beta,
        target_kl=objective.target_kl,
        lam=objective.estimator.temperature,
        evaluation=start,
        summary=result.arm,
        kept=tuple(_kept_after_all(name, start, results, tasks, finetunes)),
    )


def read_base(
    base: Evaluation, results: dict[str, StageResult], tasks: Sequence[str], finetunes: Sequence[str]
) -> Arm:
    """The base policy of a recipe without arms, which nothing was trained for."""
    return Arm(
        name=BASE,
        settings="as it is",
        family="as it is",
        penalty="none",
        beta=0.0,
        target_kl=None,
        lam=None,
        evaluation=base,
        summary=ArmSummary(
            arm=BASE,
            num_steps=0,
            num_prompts=0,
            num_completions=0,
            num_tokens=0,
            failed_rewards=0,
            seconds=0.0,
            phase_seconds={},
            weights_sha256="",
        ),
        kept=tuple(_kept_after_all(BASE, base, results, tasks, finetunes)),
    )


def _kept_after_all(
    arm: str,
    start: Evaluation,
    results: dict[str, StageResult],
    tasks: Sequence[str],
    finetunes: Sequence[str],
) -> Iterator[Kept]:
    for finetune in finetunes:
        stage = results.get(f"downstream/{arm}/{finetune}")
        if stage:
            yield from _kept_of(finetune, tasks, start, stage.evaluations[-1])


def _kept_of(finetune: str, tasks: Sequence[str], start: Evaluation, end: Evaluation) -> Iterator[Kept]:
    """Of each task that was measured before and after a fine-tune."""
    for task in tasks:
        before = task_reward(start, task)
        after = task_measured(end, task)
        if before and after:
            yield Kept(
                downstream=finetune,
                task=task,
                before=before,
                after=after.reward,
                per_prompt=after.per_prompt,
            )


def _fields_unlike_the_run(arm: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """What an arm has otherwise than the run, beyond estimator and penalty: arms that differ in it stand on
    curves of their own."""
    for section in ("objective", "learner"):
        for field, value in arm[section].items():
            if field not in NAMED and value != config[section][field]:
                yield f"{value} steps" if field == "num_steps" else f"{field} {value}"


def settings_of(objective: ObjectiveConfig) -> tuple[str, str]:
    """The objective in a few words, with and without the weight of its penalty."""
    words = describe_estimator(objective.estimator)
    penalty = describe_penalty(objective)
    family = f"{words}, {penalty}"
    if objective.target_kl:
        return f"{family} steered to KL {objective.target_kl}", family
    if objective.beta:
        return f"{words}, β {objective.beta} {penalty}", family
    return f"{words}, no penalty", family


def describe_penalty(objective: ObjectiveConfig) -> str:
    """Its kind, and what it leaves out: arms whose penalties differ in it stand on curves of their own.

    Example: "reverse" or "reverse gated (harmful below 0.5; harmless x 0.5)".
    """
    details = []
    if objective.gate:
        details.append(f"{', '.join(objective.gate.tasks)} below {objective.gate.threshold:g}")
    details += [f"{task} x {factor:g}" for task, factor in objective.beta_of.items()]
    if not details:
        return objective.penalty
    gated = " gated" if objective.gate else ""
    return f"{objective.penalty}{gated} ({'; '.join(details)})"
