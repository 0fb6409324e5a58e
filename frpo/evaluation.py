"""Measures one policy on held-out prompts by sampling: reward per task, KL to other policies, and its
certificate.

Temperature 1, top-p 1, nothing greedy; the seeds depend on the run and the prompt alone (common random
numbers), so policies are compared on the same draws.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from frpo.batching import means_of, reasons_of
from frpo.certificate import curve, tilted
from frpo.config import CertifyConfig, Config, ConfigError, ObjectiveConfig
from frpo.records import Certificate, Estimate, Evaluation, Sample, TaskReward
from frpo.roles import Pending, Rewards, Rollouts
from frpo.seeds import derive
from frpo.stops import BROKEN, SMALLER, RunStopped, stop_if_not_finite
from frpo.types import Floats, Group, Prompt, Reward, Sampling

CONFIDENCE = 0.95

Scored = Sequence[tuple[Group, tuple[Reward, ...]]]


class Scorer(Protocol):
    def submit(self, policy: Path, groups: Sequence[Group]) -> Pending[list[tuple[Floats, ...]]]:
        """Log-probs of every completion under a saved policy."""
        ...


class Trainer(Protocol):
    def submit(self, groups: Sequence[Group]) -> Pending[list[tuple[Floats, ...]]]:
        """Log-probs of every completion under the policy in training, the same as Scorer's of that policy."""
        ...


def evaluate(
    rollouts: Rollouts,
    rewards: Rewards,
    trainer: Trainer | None,
    scorer: Scorer | None,
    prompts: Sequence[Prompt],
    *,
    arm: str,
    downstream: str | None = None,
    step: int = 0,
    version: int,
    seed: int,
    completions: int,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    trained_tasks: Set[str],
    reference: Path | None = None,
    policy: Path | None = None,
    downstream_loss: float | None = None,
    num_samples: int = 0,
) -> Evaluation:
    """Measure the policy that the rollouts run now, published as `version`.

    `reference` and `policy` are the saved policies to measure KL against, None to leave that KL out; the
    policy's own log-probs are the trainer's, which holds it. The evaluation's own KL is that on the prompts
    of `trained_tasks`. Raises RunStopped where every reward of a task failed, or a number is none.
    """
    began = time.perf_counter()
    seeds = [derive(seed, "evaluate", p.id) for p in prompts]
    sampling = Sampling(completions, max_new_tokens, stop=stop)
    pending = [(g, rewards.score(g)) for g in rollouts.generate(prompts, seeds, sampling, version)]
    pending.sort(key=lambda item: item[0].index)
    groups = [g for g, _ in pending]
    own = trainer.submit(groups) if trainer and scorer and (reference or policy) else None
    others = [
        scorer.submit(folder, groups) if scorer and own and folder else None for folder in (reference, policy)
    ]
    scored = [(g, r.result()) for g, r in pending]
    ratios = [log_ratios(own.result(), other.result()) if own and other else None for other in others]
    where = " ".join(
        ["evaluation of", arm, *(["after", downstream] if downstream else []), f"at step {version}"]
    )
    measured = {"the KL to the reference": ratios[0], "the KL to the arm's policy": ratios[1]}
    numbers = {name: sum(ratio) for name, ratio in measured.items() if ratio} | {
        "the held-out loss": downstream_loss
    }
    stop_if_not_finite(where, numbers, f"the policy gives log-probs that are none: {BROKEN}")

    def kl(tasks: Set[str]) -> list[Estimate | None]:
        rows = [i for i, g in enumerate(groups) if g.prompt.task in tasks]
        return [estimate([ratio[i] for i in rows]) if ratio and rows else None for ratio in ratios]

    overall = kl(trained_tasks)
    drawn = [c for g in groups for c in g.completions]
    return Evaluation(
        arm=arm,
        downstream=downstream,
        step=step,
        rewards=tuple(
            task_reward(where, task, scored, *kl({task})) for task in sorted({g.prompt.task for g in groups})
        ),
        kl_reference=overall[0],
        kl_policy=overall[1],
        downstream_loss=downstream_loss,
        length=float(np.mean([len(c.token_ids) for c in drawn])),
        cut_share=float(np.mean([c.finish_reason == "length" for c in drawn])),
        samples=samples_of(scored, num_samples),
        seconds=time.perf_counter() - began,
    )


def estimate(per_prompt: Sequence[float]) -> Estimate:
    """Mean over prompts and its standard error."""
    values = np.asarray(per_prompt, dtype=np.float64)
    spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(mean=float(values.mean()), se=spread)


def log_ratios(own: Sequence[tuple[Floats, ...]], other: Sequence[tuple[Floats, ...]]) -> list[float]:
    """Per prompt, the estimate of KL(drawn || other) in nats per completion: mean of sum over tokens of log q
    - log p, both by transformers. The engine's log q is another number for the same weights, in bfloat16 by 1
    to 2 nats in 1,000 tokens."""
    return [
        float(np.mean([(q.astype(np.float64) - p).sum() for q, p in zip(qs, ps, strict=True)]))
        for qs, ps in zip(own, other, strict=True)
    ]


def task_reward(
    where: str, task: str, scored: Scored, kl_reference: Estimate | None, kl_policy: Estimate | None
) -> TaskReward:
    """Mean reward over prompts of a task; failed rewards are left out and counted. Raises RunStopped where
    all failed."""
    mine = [(g, rs) for g, rs in scored if g.prompt.task == task]
    everything = [r for _, rs in mine for r in rs]
    stop_if_all_fail(where, task, everything)
    drawn = [[r.total for r in rs if r.total is not None] for _, rs in mine]
    per_prompt = [float(np.mean(v)) if v else None for v in drawn]
    means = [v for v in per_prompt if v is not None]
    stop_if_not_finite(
        where,
        {f"the reward of task {task!r}": float(np.mean(means))},
        f"rewards are too large to add up; {SMALLER}",
    )
    return TaskReward(
        task=task,
        reward=estimate(means),
        parts=means_of((name, value) for r in everything for name, value in r.parts.items()),
        num_prompts=len(mine),
        num_completions=len(everything),
        failed=sum(r.total is None for r in everything),
        kl_reference=kl_reference,
        kl_policy=kl_policy,
        per_prompt=tuple(per_prompt),
    )


def stop_if_all_fail(where: str, task: str, rewards: Sequence[Reward]) -> None:
    """A task without a single reward was not measured."""
    if all(r.total is None for r in rewards):
        reasons = "; ".join(reasons_of(r.error for r in rewards)) or "no reason was given"
        raise RunStopped(f"{where}: all {len(rewards)} rewards of task {task!r} failed: {reasons}")


def samples_of(scored: Scored, count: int) -> tuple[Sample, ...]:
    """The first completion of evenly spaced prompts, the same prompts for every policy."""
    chosen = [scored[i * len(scored) // count] for i in range(min(count, len(scored)))] if count else []
    return tuple(
        Sample(task=g.prompt.task, prompt=g.prompt.text, completion=g.completions[0].text, reward=rs[0].total)
        for g, rs in chosen
    )


def mean_reward(evaluation: Evaluation) -> float:
    """Mean over tasks of the mean reward."""
    return float(np.mean([t.reward.mean for t in evaluation.rewards]))


def certify(
    rollouts: Rollouts,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    config: Config,
    objective: ObjectiveConfig | None,
) -> tuple[Certificate, ...]:
    """The certificate of each task of `prompts`, for the policy that the rollouts run as version 0. Raises
    RunStopped where every reward of a task failed, and as `certificate` does."""
    assert config.certify is not None
    seeds = [derive(config.seed, "certify", p.id) for p in prompts]
    sampling = Sampling(
        config.certify.completions_per_prompt, config.rollout.max_new_tokens, stop=config.rollout.stop
    )
    pending = [(g, rewards.score(g)) for g in rollouts.generate(prompts, seeds, sampling, 0)]
    scored = sorted(((g, r.result()) for g, r in pending), key=lambda item: item[0].index)
    tasks = sorted({g.prompt.task for g, _ in scored})
    for task in tasks:
        stop_if_all_fail("certificate", task, [r for g, rs in scored if g.prompt.task == task for r in rs])
    return tuple(
        certificate(t, [rs for g, rs in scored if g.prompt.task == t], config.certify, objective, config.seed)
        for t in tasks
    )


def certificate(
    task: str,
    scored: Sequence[Sequence[Reward]],
    config: CertifyConfig,
    objective: ObjectiveConfig | None,
    seed: int,
) -> Certificate:
    """From the rewards of one task, [prompts][completions]. Raises ConfigError for a reward below the
    floor."""
    drawn = np.array([[config.floor if r.total is None else r.total for r in rs] for rs in scored])
    if drawn.min() < config.floor:
        raise ConfigError(
            f"certify.floor: {config.floor:g} is above a reward of {drawn.min():g}; give the least value "
            "that it can take"
        )
    found = curve(drawn, config.radii, floor=config.floor, confidence=CONFIDENCE, seed=seed)
    radius = None
    if objective and objective.method == "frpo":
        radius = objective.rho if objective.rho is not None else tilted(drawn, objective.lam)[1]
    return Certificate(
        task=task,
        floor=config.floor,
        confidence=CONFIDENCE,
        radii=tuple(config.radii),
        radius=radius,
        plug_in=tuple(map(float, found.plug_in)),
        lo=tuple(map(float, found.lo)),
        hi=tuple(map(float, found.hi)),
        certified=tuple(map(float, found.certified)),
        failed=sum(r.total is None for rs in scored for r in rs),
        rewards=tuple(tuple(map(float, row)) for row in drawn),
    )


@dataclass(frozen=True)
class OppositePending:
    inner: Pending[tuple[Reward, ...]]

    def ready(self) -> bool:
        return self.inner.ready()

    def result(self) -> tuple[Reward, ...]:
        return tuple(replace(r, total=None if r.total is None else -r.total) for r in self.inner.result())


class Opposite:
    """Rewards with the sign turned, for the attack; implements roles.Rewards. The parts keep their sign."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards

    def score(self, group: Group) -> OppositePending:
        return OppositePending(self.rewards.score(group))
