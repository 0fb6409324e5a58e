"""Measures one policy on the held-out prompts by sampling: reward per task, KL to the reference and to a second policy.

Temperature 1, top-p 1, nothing greedy; the seeds depend on the run and the prompt alone (common random numbers), so
policies are compared on the same draws.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Protocol

import numpy as np

from frpo.records import Estimate, Evaluation, Sample, TaskReward
from frpo.roles import Pending, Rewards, Rollouts
from frpo.seeds import derive
from frpo.types import Floats, Group, Prompt, Reward, Sampling

Scored = Sequence[tuple[Group, tuple[Reward, ...]]]


class Scorer(Protocol):
    def submit(self, policy: Path, groups: Sequence[Group]) -> Pending[list[tuple[Floats, ...]]]:
        """Log-probs of every completion under a saved policy."""
        ...


def evaluate(
    rollouts: Rollouts,
    rewards: Rewards,
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
    kl_tasks: Set[str],
    reference: Path | None = None,
    policy: Path | None = None,
    downstream_loss: float | None = None,
    num_samples: int = 0,
) -> Evaluation:
    """Measure the policy that the rollouts run now, published as `version`.

    `reference` and `policy` are the saved policies to measure KL against, on the prompts of `kl_tasks` (those that were
    trained on); None leaves that KL out.
    """
    began = time.perf_counter()
    seeds = [derive(seed, "evaluate", p.id) for p in prompts]
    sampling = Sampling(completions, max_new_tokens, stop=stop)
    pending = [(g, rewards.score(g)) for g in rollouts.generate(prompts, seeds, sampling, version)]
    pending.sort(key=lambda item: item[0].index)
    groups = [g for g, _ in pending]
    trained = [g for g in groups if g.prompt.task in kl_tasks]
    others = [scorer.submit(folder, trained) if scorer and folder else None for folder in (reference, policy)]
    scored = [(g, r.result()) for g, r in pending]
    kl = [divergence(trained, other.result()) if other else None for other in others]
    drawn = [c for g in groups for c in g.completions]
    return Evaluation(
        arm=arm,
        downstream=downstream,
        step=step,
        rewards=tuple(task_reward(task, scored) for task in sorted({g.prompt.task for g in groups})),
        kl_reference=kl[0],
        kl_policy=kl[1],
        downstream_loss=downstream_loss,
        length=float(np.mean([len(c.token_ids) for c in drawn])),
        cut_share=float(np.mean([c.finish_reason == "length" for c in drawn])),
        samples=samples_of(scored, num_samples),
        seconds=time.perf_counter() - began,
    )


def estimate(per_prompt: Sequence[float]) -> Estimate:
    """Mean over prompts and its standard error."""
    values = np.asarray(per_prompt, dtype=np.float64)
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(mean=float(values.mean()), se=float(spread) if np.isfinite(spread) else 0.0)


def divergence(groups: Sequence[Group], other: Sequence[tuple[Floats, ...]]) -> Estimate:
    """KL(drawn || other), nats per completion: mean of sum over tokens of log q - log p."""
    return estimate(
        [
            float(np.mean([(c.logprobs.astype(np.float64) - p).sum() for c, p in zip(g.completions, ps, strict=True)]))
            for g, ps in zip(groups, other, strict=True)
        ]
    )


def task_reward(task: str, scored: Scored) -> TaskReward:
    """Mean reward over prompts of a task; failed rewards are left out and counted."""
    mine = [(g, rs) for g, rs in scored if g.prompt.task == task]
    per_prompt = [[r.total for r in rs if r.total is not None] for _, rs in mine]
    everything = [r for _, rs in mine for r in rs]
    parts = sorted({p for r in everything for p in r.parts})
    return TaskReward(
        task=task,
        reward=estimate([float(np.mean(v)) for v in per_prompt if v] or [float("nan")]),
        parts={p: float(np.mean([v for r in everything if (v := r.parts.get(p)) is not None] or [float("nan")])) for p in parts},
        num_prompts=len(mine),
        num_completions=len(everything),
        failed=sum(r.total is None for r in everything),
    )


def samples_of(scored: Scored, count: int) -> tuple[Sample, ...]:
    """The first completion of evenly spaced prompts, the same prompts for every policy."""
    chosen = [scored[i * len(scored) // count] for i in range(min(count, len(scored)))] if count else []
    return tuple(Sample(task=g.prompt.task, prompt=g.prompt.text, completion=g.completions[0].text, reward=rs[0].total) for g, rs in chosen)


def mean_reward(evaluation: Evaluation) -> float:
    """Mean over tasks of the mean reward."""
    return float(np.mean([t.reward.mean for t in evaluation.rewards]))
