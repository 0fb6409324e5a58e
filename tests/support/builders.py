"""Records with values, for tests to change what they are about."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from frpo.objective import Weights
from frpo.records import Estimate, Evaluation, TaskReward
from frpo.stats import BatchStats, GateStats, Phases, StepMetrics, Times, UpdateStats

BATCH = BatchStats(
    reward=0.5,
    reward_std=0.11,
    group_std=0.12,
    equal_groups=0.2,
    advantage_std=1.0,
    non_monotone=0.01,
    beta=0.13,
    gate=GateStats(failing_share=0.31, kl_outcome=0.04, kl_success=0.07, kl_failure=0.09),
    lam=0.55,
    radius=0.21,
    effective_samples=5.0,
    length=5.5,
    cut_share=0.1,
    failed_rewards=1,
    dropped_groups=0,
    num_prompts=4,
    num_completions=8,
    num_tokens=40,
    staleness=0.25,
    max_staleness=2,
    reward_parts={"a": 0.52},
    reward_tasks={"t": 0.51},
    errors=("no judge",),
)
UPDATE = UpdateStats(
    loss=0.14,
    penalty=0.02,
    grad_norm=2.0,
    learning_rate=1e-3,
    entropy=1.1,
    clip_share=0.03,
    capped_share=0.01,
    mismatch_kl=0.004,
    stale_kl=0.006,
    kl=0.3,
    num_computed_tokens=60,
    learner_s=0.05,
)
PHASES = Phases(
    generate_s=0.15,
    score_s=0.01,
    waiting_rewards=3,
    waiting_reference=0,
    update_s=0.16,
    publish_s=0.08,
    step_s=0.5,
    driver_s=0.06,
)


def metrics(step: int, **changed: Any) -> StepMetrics:
    """Of one step; `changed` are fields of any of the records in it."""
    times = Times(
        generate_at=0.5 * step,
        score_at=0.5 * step + 0.15,
        update_at=0.5 * step + 0.16,
        publish_at=0.5 * step + 0.32,
        drawn=((0.5 * step - 0.1, 0.5 * step + 0.15),),
        groups_ahead=1,
    )
    of = {
        kind: {f.name: changed.pop(f.name) for f in fields(kind) if f.name in changed}
        for kind in (BatchStats, UpdateStats, Phases)
    }
    assert not changed, changed
    return StepMetrics(
        step=step,
        policy_version=step,
        batch=replace(BATCH, **of[BatchStats]),
        update=replace(UPDATE, **of[UpdateStats]),
        phases=replace(PHASES, **of[Phases]),
        times=times,
        published_bytes=1000,
    )


def measured_task(task: str, mean: float, **changed: Any) -> TaskReward:
    """Reward of a task; `changed` are fields of it, checked."""
    usual: dict[str, Any] = {
        "task": task,
        "reward": Estimate(mean=mean, se=0.02),
        "parts": {},
        "num_prompts": 4,
        "num_completions": 16,
        "failed": 0,
        "kl_reference": None,
        "kl_policy": None,
    }
    return TaskReward(**{**usual, **changed})


def evaluation_of(arm: str, *rewards: TaskReward, **changed: Any) -> Evaluation:
    """One policy, measured on some tasks; `changed` are fields of it, checked."""
    usual: dict[str, Any] = {
        "arm": arm,
        "downstream": None,
        "step": 0,
        "rewards": rewards,
        "kl_reference": None,
        "kl_policy": None,
        "downstream_loss": None,
        "length": 5.0,
        "cut_share": 0.0,
        "samples": (),
        "seconds": 1.0,
    }
    return Evaluation(**{**usual, **changed})


def weigh(advantages: Tensor, beta: float = 0.1) -> Weights:
    """Every completion under one weight of the penalty."""
    return Weights(advantages, torch.full_like(advantages, beta))
