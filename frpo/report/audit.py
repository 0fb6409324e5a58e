"""The folder of an audit -> audit.json: certificate, fine-tunes, and the worst of those that count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from frpo.config import Config, ConfigError, UtilityConfig
from frpo.grid import (
    CERTIFICATE,
    FineTune,
    audit_of,
    audited_task,
    folder_of,
    list_fine_tunes,
    seeds_of,
)
from frpo.outline.stage import BASE
from frpo.recipe import load_recipe
from frpo.records import Certificate, Evaluation, StageResult
from frpo.report.audit_schema import POLICY, RECIPE, Audit, AuditedPolicy, FineTuned, Promise
from frpo.report.lookup import task_measured, task_reward
from frpo.report.robustness import Fate, MeasuredPolicy, measure_fates
from frpo.report.spread import Spread, spread_of


def gather_audit(folder: Path) -> Audit:
    """Read what an audit's runs have left. Raises ConfigError where its certificate is not finished."""
    config = load_recipe(folder / RECIPE)
    utility = audit_of(config).utility
    policy = AuditedPolicy.model_validate_json((folder / POLICY).read_text())
    task = audited_task(config)
    certificate = _read_certificate(folder, task)
    trails = [_read_trails(config, fine_tune, folder) for fine_tune in list_fine_tunes(config)]
    ends = list(_ends_of(trails, certificate, utility))
    fine_tunes = _judge_ends(ends, utility)
    finished = [trail for trail in trails if trail.evaluations]
    return Audit(
        model=policy.model,
        weights_sha256=policy.weights_sha256,
        task=task,
        prompts=tuple(source.path for source in config.data.heldout if source.task in (None, task)),
        reward=tuple(_describe_rewards(config, task)),
        utility=describe_utility(utility),
        seeds=tuple(seeds_of(config)),
        start=_start_of(finished, task) if finished else None,
        certificate=_promise_of(certificate),
        fine_tunes=tuple(fine_tunes),
        worst=choose_worst(fine_tunes),
        stopped=tuple(trail.fine_tune.name for trail in trails if len(trail.evaluations) < trail.asked),
    )


def choose_worst(fine_tunes: Sequence[FineTuned]) -> int | None:
    """Of those that count the one that left least reward; of equals the more useful, then the first."""
    counting = [number for number, fine_tune in enumerate(fine_tunes) if fine_tune.counts]

    def harm(number: int) -> tuple[float, float]:
        utility = fine_tunes[number].utility
        return fine_tunes[number].kept.mean, -utility.mean if utility else 0.0

    return min(counting, key=harm, default=None)


# ---- reading


@dataclass(frozen=True)
class Trail:
    """What was measured of one fine-tune."""

    fine_tune: FineTune
    evaluations: tuple[tuple[Evaluation, ...], ...]
    """Of each finished seed, in order of step; the first is of the untouched policy."""
    asked: int
    """Seeds."""


def _read_trails(config: Config, fine_tune: FineTune, folder: Path) -> Trail:
    trails = []
    for seed in seeds_of(config):
        run = folder_of(fine_tune, seed, folder)
        result = _read_stage(run, f"downstream/{BASE}/{fine_tune.task.name}")
        if result:
            trails.append(result.evaluations)
    return Trail(fine_tune, tuple(trails), len(seeds_of(config)))


def _read_stage(run: Path, stage: str) -> StageResult | None:
    """None where it is not finished."""
    file = run / stage / "done.json"
    return StageResult.model_validate_json(file.read_text()) if file.exists() else None


def _read_certificate(folder: Path, task: str) -> Certificate:
    result = _read_stage(folder / CERTIFICATE, f"certify/{BASE}")
    certificates = {certificate.task: certificate for certificate in result.certificates} if result else {}
    if task not in certificates:
        raise ConfigError(f"audit: {folder} holds no certificate of task {task!r}; `frpo audit` makes it")
    return certificates[task]


def _promise_of(certificate: Certificate) -> Promise:
    return Promise(
        floor=certificate.floor,
        confidence=certificate.confidence,
        num_prompts=len(certificate.rewards),
        num_completions=len(certificate.rewards[0]),
        radii=certificate.radii,
        certified=certificate.certified,
        plug_in=certificate.plug_in,
        lo=certificate.lo,
        hi=certificate.hi,
    )


def _describe_rewards(config: Config, task: str) -> Iterator[str]:
    """Those that apply to the task: function, folder or address."""
    for reward in config.rewards:
        if not reward.tasks or task in reward.tasks:
            source = [getattr(reward, name, None) for name in ("function", "path", "urls", "app")]
            yield str(next(name for name in source if name))


def _start_of(trails: Sequence[Trail], task: str) -> Spread:
    """Every fine-tune of a seed begins with the same draws of the untouched policy."""
    longest = max(trails, key=lambda trail: len(trail.evaluations))
    return spread_of([_reward_of(evaluations[0], task) for evaluations in longest.evaluations])


def _reward_of(evaluation: Evaluation, task: str) -> float:
    reward = task_reward(evaluation, task)
    if reward is None:
        raise ConfigError(f"audit.task: {task!r} was not measured; give held-out prompts of this task")
    return reward.mean


# ---- each fine-tune


@dataclass(frozen=True)
class End:
    """A fine-tune after so many steps, one item a seed in every list."""

    fine_tune: FineTune
    steps: int
    points: tuple[MeasuredPolicy, ...]
    gains: tuple[float, ...]
    """Over the untouched policy, in what utility is measured by, or as a share of it; empty where it was not
    measured."""


def _ends_of(trails: Sequence[Trail], certificate: Certificate, utility: UtilityConfig) -> Iterator[End]:
    for trail in trails:
        for steps in trail.fine_tune.steps if trail.evaluations else ():
            ends = [_find_step(seed, steps) for seed in trail.evaluations]
            points = _place_ends(trail.fine_tune.name, ends, certificate)
            starts = [seed[0] for seed in trail.evaluations]
            yield End(trail.fine_tune, steps, points, _measure_gains(starts, ends, utility))


def _find_step(evaluations: Sequence[Evaluation], step: int) -> Evaluation:
    return next(evaluation for evaluation in evaluations if evaluation.step == step)


def _place_ends(
    name: str, ends: Sequence[Evaluation], certificate: Certificate
) -> tuple[MeasuredPolicy, ...]:
    """On the certificate's plane."""
    fates = [Fate(name, attack=False, evaluation=end) for end in ends]
    return tuple(measure_fates(certificate, fates))


def _measure_gains(
    starts: Sequence[Evaluation], ends: Sequence[Evaluation], utility: UtilityConfig
) -> tuple[float, ...]:
    """Of each seed; empty where one was not measured."""
    gains = [measure_gain(start, end, utility) for start, end in zip(starts, ends, strict=True)]
    measured = tuple(gain for gain in gains if gain is not None)
    return measured if len(measured) == len(gains) else ()


def measure_gain(start: Evaluation, end: Evaluation, utility: UtilityConfig) -> float | None:
    """`best`: how far the loss fell, nats per token, or the reward rose. `start`: the reward as a share of
    what it was. None where it was not measured."""
    if utility.task is None:
        if start.downstream_loss is None or end.downstream_loss is None:
            return None
        return start.downstream_loss - end.downstream_loss
    before, after = task_measured(start, utility.task), task_measured(end, utility.task)
    if before is None or after is None:
        return None
    if utility.of == "best":
        return after.reward.mean - before.reward.mean
    return after.reward.mean / before.reward.mean if before.reward.mean > 0 else None


def _judge_ends(ends: Sequence[End], utility: UtilityConfig) -> list[FineTuned]:
    """Each with its utility and whether it counts."""
    best: dict[str | None, float] = {}
    for end in ends:
        if end.gains:
            scale = _scale_of(end, utility)
            best[scale] = max(best.get(scale, 0.0), spread_of(end.gains).mean)
    fine_tunes = []
    for end in ends:
        whole = 1.0 if utility.of == "start" else best.get(_scale_of(end, utility), 0.0)
        shares = [gain / whole for gain in end.gains] if whole > 0 else []
        fine_tunes.append(_fine_tuned(end, shares, utility.at_least))
    return fine_tunes


def _scale_of(end: End, utility: UtilityConfig) -> str | None:
    """What gains are compared among: losses on one template, rewards everywhere."""
    return end.fine_tune.template if utility.task is None else None


def _fine_tuned(end: End, shares: Sequence[float], at_least: float) -> FineTuned:
    share = spread_of(shares) if shares else None
    own = end.fine_tune
    return FineTuned(
        name=own.name,
        by_rl=own.by_rl,
        learning_rate=own.learning_rate,
        steps=end.steps,
        rank=own.rank,
        template=own.template,
        harmful_share=own.harmful_share,
        kept=spread_of([point.reward.mean for point in end.points]),
        kl=spread_of([point.kl.mean for point in end.points]),
        certified=spread_of([point.certified for point in end.points]),
        below=sum(point.below for point in end.points),
        utility=share,
        counts=share is not None and share.mean >= at_least,
    )


def describe_utility(utility: UtilityConfig) -> str:
    """Example: at least 80 % of the most that any of them learnt of its own examples (held-out loss)"""
    share = f"at least {utility.at_least:.0%}".replace("%", " %")
    if utility.of == "start":
        return f"{share} of the untouched policy's reward on {utility.task}"
    if utility.task is None:
        return f"{share} of the most that any of them learnt (loss on held-out examples)"
    return f"{share} of the most that any of them gained (reward on {utility.task})"
