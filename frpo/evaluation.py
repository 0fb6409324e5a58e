"""Measures one policy on held-out prompts by sampling: reward per task, KL to other policies, and its
certificate.

Temperature 1, top-p 1, nothing greedy; the seeds depend on the run and the prompt alone (common random
numbers), so policies are compared on the same draws.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from frpo.batching import means_of, reasons_of
from frpo.certificate import curve_of, tilt_to
from frpo.config import CertifyConfig, Config, ConfigError, ObjectiveConfig
from frpo.penalties import log_ratios_of
from frpo.records import Certificate, Estimate, Evaluation, Sample, TaskReward
from frpo.roles import Pending, PolicyScorer, Rewards, Rollouts, Trainer
from frpo.seeds import derive
from frpo.stops import BROKEN, SMALLER, RunStopped, stop_if_not_finite
from frpo.types import Floats, Group, Prompt, Reward, Sampling

CONFIDENCE = 0.95

Scored = Sequence[tuple[Group, tuple[Reward, ...]]]


@dataclass(frozen=True)
class Measurers:
    """Whom a measurement needs."""

    rollouts: Rollouts
    rewards: Rewards
    trainer: Trainer | None = None
    """Holds the policy that the rollouts run; None leaves every KL out, as without a scorer."""
    scorer: PolicyScorer | None = None


@dataclass(frozen=True)
class Draws:
    """What is drawn from each prompt, at temperature 1 and top_p 1."""

    seed: int
    completions: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    version: int = 0
    """Under which the policy was published."""

    def sampling(self) -> Sampling:
        return Sampling(self.completions, self.max_new_tokens, stop=self.stop)


@dataclass(frozen=True)
class Against:
    """The saved policies that the KL is measured to; None leaves that KL out."""

    tasks: Set[str]
    """The evaluation's own KL is that on prompts of these tasks."""
    reference: Path | None = None
    policy: Path | None = None
    """The arm's, before a downstream fine-tune."""


@dataclass(frozen=True)
class Label:
    """What is said of a measurement beside its numbers."""

    arm: str
    downstream: str | None = None
    step: int = 0
    downstream_loss: float | None = None
    """nats per token on held-out examples of the fine-tune"""
    num_samples: int = 0
    """Completions kept for people to read."""


def evaluate(
    measurers: Measurers, prompts: Sequence[Prompt], draws: Draws, against: Against, label: Label
) -> Evaluation:
    """Measure the policy that the rollouts run now. Its own log-probs are the trainer's.

    Raises RunStopped where every reward of a task failed, or a number is none.
    """
    began = time.perf_counter()
    where = f"evaluation of {label.arm}{f' after {label.downstream}' if label.downstream else ''}"
    where = f"{where} at step {draws.version}"
    drawn = draw(measurers, prompts, draws, "evaluate")
    divergences = Divergences(measurers, [item.group for item in drawn], against)
    scored = [item.wait() for item in drawn]
    to_reference, to_policy = divergences.wait()
    numbers = {
        "the KL to the reference": total_of(to_reference),
        "the KL to the arm's policy": total_of(to_policy),
        "the held-out loss": label.downstream_loss,
    }
    stop_if_not_finite(where, numbers, f"the policy gives log-probs that are none: {BROKEN}")
    tasks = [group.prompt.task for group, _ in scored]
    completions = list(itertools.chain.from_iterable(group.completions for group, _ in scored))
    return Evaluation(
        arm=label.arm,
        downstream=label.downstream,
        step=label.step,
        rewards=tuple(
            measure_task(
                where,
                task,
                scored,
                mean_over({task}, tasks, to_reference),
                mean_over({task}, tasks, to_policy),
            )
            for task in sorted(set(tasks))
        ),
        kl_reference=mean_over(against.tasks, tasks, to_reference),
        kl_policy=mean_over(against.tasks, tasks, to_policy),
        downstream_loss=label.downstream_loss,
        length=float(np.mean([len(c.token_ids) for c in completions])),
        cut_share=float(np.mean([c.finish_reason == "length" for c in completions])),
        samples=samples_of(scored, label.num_samples),
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class Drawn:
    """A group whose rewards are being computed."""

    group: Group
    rewards: Pending[tuple[Reward, ...]]

    def wait(self) -> tuple[Group, tuple[Reward, ...]]:
        return self.group, self.rewards.result()


def draw(measurers: Measurers, prompts: Sequence[Prompt], draws: Draws, purpose: str) -> list[Drawn]:
    """The groups of some prompts, in their order, each sent to be scored as soon as it was there. The seeds
    depend on the purpose and the prompt."""
    seeds = [derive(draws.seed, purpose, prompt.id) for prompt in prompts]
    groups = measurers.rollouts.generate(prompts, seeds, draws.sampling(), draws.version)
    drawn = [Drawn(group, measurers.rewards.score(group)) for group in groups]
    return sorted(drawn, key=lambda item: item.group.index)


class Divergences:
    """Log-probs of drawn groups that were asked for, and the log-ratios that come of them."""

    def __init__(self, measurers: Measurers, groups: Sequence[Group], against: Against) -> None:
        trainer, scorer = measurers.trainer, measurers.scorer
        self.own: Pending[list[tuple[Floats, ...]]] | None = None
        self.others: list[Pending[list[tuple[Floats, ...]]] | None] = [None, None]
        if trainer and scorer and (against.reference or against.policy):
            self.own = trainer.submit(groups)
            folders = [folder for folder in (against.reference, against.policy) if folder]
            asked = {str(folder): scorer.submit(folder, groups) for folder in dict.fromkeys(folders)}
            self.others = [asked.get(str(folder)) for folder in (against.reference, against.policy)]

    def wait(self) -> tuple[list[float] | None, list[float] | None]:
        """Per prompt, the estimates of KL(drawn || reference) and of KL(drawn || arm's policy), nats per
        completion."""
        reference, policy = (self._ratios(other) for other in self.others)
        return reference, policy

    def _ratios(self, other: Pending[list[tuple[Floats, ...]]] | None) -> list[float] | None:
        if self.own is None or other is None:
            return None
        return mean_log_ratios(self.own.result(), other.result())


def total_of(values: Sequence[float] | None) -> float | None:
    return sum(values) if values else None


def mean_over(tasks: Set[str], task_of: Sequence[str], values: Sequence[float] | None) -> Estimate | None:
    """Over the prompts of some tasks; `task_of` and `values` are per prompt."""
    if values is None:
        return None
    chosen = [value for value, task in zip(values, task_of, strict=True) if task in tasks]
    return estimate_mean(chosen) if chosen else None


def estimate_mean(per_prompt: Sequence[float]) -> Estimate:
    """Mean over prompts and its standard error."""
    values = np.asarray(per_prompt, dtype=np.float64)
    spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(mean=float(values.mean()), se=spread)


def mean_log_ratios(own: Sequence[tuple[Floats, ...]], other: Sequence[tuple[Floats, ...]]) -> list[float]:
    """Per prompt, the estimate of KL(drawn || other) in nats per completion: mean of sum over tokens of
    log q - log p, both by transformers. The engine's log q is another number for the same weights, in
    bfloat16 by 1 to 2 nats in 1,000 tokens."""
    return [float(np.mean(log_ratios_of(q, p))) for q, p in zip(own, other, strict=True)]


def measure_task(
    where: str, task: str, scored: Scored, kl_reference: Estimate | None, kl_policy: Estimate | None
) -> TaskReward:
    """Mean reward over prompts of a task; failed rewards are left out and counted. Raises RunStopped where
    all failed."""
    mine = [rewards for group, rewards in scored if group.prompt.task == task]
    everything = list(itertools.chain.from_iterable(mine))
    stop_if_all_fail(where, task, everything)
    per_prompt = [average_rewards(rewards) for rewards in mine]
    means = [value for value in per_prompt if value is not None]
    stop_if_not_finite(
        where,
        {f"the reward of task {task!r}": float(np.mean(means))},
        f"rewards are too large to add up; {SMALLER}",
    )
    return TaskReward(
        task=task,
        reward=estimate_mean(means),
        parts=means_of(itertools.chain.from_iterable(r.parts.items() for r in everything)),
        num_prompts=len(mine),
        num_completions=len(everything),
        failed=sum(r.total is None for r in everything),
        kl_reference=kl_reference,
        kl_policy=kl_policy,
        per_prompt=tuple(per_prompt),
    )


def average_rewards(rewards: Sequence[Reward]) -> float | None:
    """Of those that did not fail; None where all did."""
    totals = [reward.total for reward in rewards if reward.total is not None]
    return float(np.mean(totals)) if totals else None


def stop_if_all_fail(where: str, task: str, rewards: Sequence[Reward]) -> None:
    """A task without a single reward was not measured."""
    if all(r.total is None for r in rewards):
        reasons = "; ".join(reasons_of(r.error for r in rewards)) or "no reason was given"
        raise RunStopped(f"{where}: all {len(rewards)} rewards of task {task!r} failed: {reasons}")


def samples_of(scored: Scored, count: int) -> tuple[Sample, ...]:
    """The first completion of evenly spaced prompts, the same prompts for every policy."""
    count = min(count, len(scored))
    chosen = [scored[i * len(scored) // count] for i in range(count)]
    return tuple(
        Sample(
            task=group.prompt.task,
            prompt=group.prompt.text,
            completion=group.completions[0].text,
            reward=rewards[0].total,
        )
        for group, rewards in chosen
    )


def make_certificates(
    rollouts: Rollouts,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    config: Config,
    objective: ObjectiveConfig | None,
) -> tuple[Certificate, ...]:
    """The certificate of each task of `prompts`, for the policy that the rollouts run as version 0. Raises
    RunStopped where every reward of a task failed, and as `certificate` does."""
    asked, rollout = config.certify, config.rollout
    assert asked is not None
    draws = Draws(config.seed, asked.completions_per_prompt, rollout.max_new_tokens, rollout.stop)
    scored = [item.wait() for item in draw(Measurers(rollouts, rewards), prompts, draws, "certify")]
    by_task: dict[str, list[tuple[Reward, ...]]] = {}
    for group, of_group in scored:
        by_task.setdefault(group.prompt.task, []).append(of_group)
    for task in sorted(by_task):
        stop_if_all_fail("certificate", task, list(itertools.chain.from_iterable(by_task[task])))
    return tuple(
        make_certificate(task, by_task[task], asked, objective, config.seed) for task in sorted(by_task)
    )


def make_certificate(
    task: str,
    scored: Sequence[Sequence[Reward]],
    config: CertifyConfig,
    objective: ObjectiveConfig | None,
    seed: int,
) -> Certificate:
    """From the rewards of one task, [prompts][completions]. Raises ConfigError for a reward below the
    floor."""
    drawn = np.array([totals_or(config.floor, rewards) for rewards in scored])
    if drawn.min() < config.floor:
        raise ConfigError(
            f"certify.floor: {config.floor:g} is above a reward of {drawn.min():g}; give the least value "
            "that it can take"
        )
    bounds = curve_of(drawn, config.radii, floor=config.floor, confidence=CONFIDENCE, seed=seed)
    return Certificate(
        task=task,
        floor=config.floor,
        confidence=CONFIDENCE,
        radii=tuple(config.radii),
        radius=trained_radius(drawn, objective),
        plug_in=tuple(map(float, bounds.plug_in)),
        lo=tuple(map(float, bounds.lo)),
        hi=tuple(map(float, bounds.hi)),
        certified=tuple(map(float, bounds.certified)),
        failed=sum(reward.total is None for reward in itertools.chain.from_iterable(scored)),
        rewards=tuple(tuple(map(float, row)) for row in drawn),
    )


def totals_or(floor: float, rewards: Sequence[Reward]) -> list[float]:
    """A failed reward counts as the floor."""
    return [floor if reward.total is None else reward.total for reward in rewards]


def trained_radius(rewards: NDArray[np.float64], objective: ObjectiveConfig | None) -> float | None:
    """The radius, nats, that the objective was trained for, given or that of its temperature on these draws;
    None for estimators without one."""
    if objective is None:
        return None
    lam = objective.estimator.temperature
    return objective.estimator.radius if lam is None else tilt_to(rewards, lam)[1]


@dataclass(frozen=True)
class OppositePending:
    inner: Pending[tuple[Reward, ...]]

    def ready(self) -> bool:
        return self.inner.ready()

    def result(self) -> tuple[Reward, ...]:
        return tuple(turn_sign(reward) for reward in self.inner.result())


def turn_sign(reward: Reward) -> Reward:
    return reward if reward.total is None else replace(reward, total=-reward.total)


class Opposite:
    """Rewards with the sign turned, for the attack; implements roles.Rewards. The parts keep their sign."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards

    def score(self, group: Group) -> OppositePending:
        return OppositePending(self.rewards.score(group))
