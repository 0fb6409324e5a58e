"""From scored groups to the batch that the learner trains on: who counts, with what advantage. Pure
functions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from frpo.config import ObjectiveConfig
from frpo.estimators import make_estimator
from frpo.objective import Groups, measure_tilt, non_monotone_share
from frpo.penalties import Doubles, Mask, Penalty
from frpo.stats import BatchStats
from frpo.steering import begin_steering, lam_for
from frpo.types import Completion, Floats, Group, Ints, RolloutBatch, ScoredGroup, Sequences, Steering


def flatten(pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> Sequences:
    """Pack (prompt ids, completion ids) pairs into flat arrays."""
    parts = list(itertools.chain.from_iterable(pairs))
    return Sequences(
        tokens=np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32),
        prompt_lengths=np.array([len(p) for p, _ in pairs], dtype=np.int32),
        lengths=np.array([len(p) + len(c) for p, c in pairs], dtype=np.int32),
    )


def join_sequences(first: Sequences, second: Sequences) -> Sequences:
    """The sequences of both, those of the first in front."""
    return Sequences(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.prompt_lengths, second.prompt_lengths]),
        np.concatenate([first.lengths, second.lengths]),
    )


def rewards_and_mask(scored: Sequence[ScoredGroup], objective: ObjectiveConfig) -> tuple[Doubles, Mask]:
    """Rewards `[G, k]` (0 where there is none) and the mask of those that train.

    A failed reward leaves its group. A completion ended by the length limit leaves it too under cut: mask,
    and is lowered by cut_penalty under cut: penalise.
    """
    shape = (len(scored), len(scored[0].rewards))
    rewards = np.zeros(shape)
    mask = np.zeros(shape, dtype=bool)
    for g, item in enumerate(scored):
        for j, (reward, completion) in enumerate(zip(item.rewards, item.group.completions, strict=True)):
            is_cut = completion.finish_reason == "length"
            if reward.total is None or (is_cut and objective.cut == "mask"):
                continue
            lowered = is_cut and objective.cut == "penalise"
            rewards[g, j] = reward.total - (objective.cut_penalty if lowered else 0.0)
            mask[g, j] = True
    return rewards, mask


def blocks_of(groups: Sequence[Group], budget_tokens: int) -> list[list[Group]]:
    """Neighbours that are scored together, up to `budget_tokens` or one group: the same whoever scores them,
    so that a policy's log-probs differ from themselves by nothing, in bfloat16 too."""
    blocks: list[list[Group]] = []
    room = 0
    for group in groups:
        size = sum(len(group.prompt.token_ids) + len(c.token_ids) for c in group.completions)
        if not blocks or size > room:
            blocks.append([])
            room = budget_tokens
        blocks[-1].append(group)
        room -= size
    return blocks


def make_batch(
    scored: Sequence[ScoredGroup],
    objective: ObjectiveConfig,
    steering: Steering | None = None,
    version: int = 0,
) -> tuple[RolloutBatch, BatchStats]:
    """Order the groups by prompt index, drop what has no reward, and attach the advantages. `steering` None:
    the first step. `version`: of the policy that is updated by it."""
    scored = sorted(scored, key=lambda s: s.group.index)
    steering = steering or begin_steering(objective)
    rewards, has_reward = rewards_and_mask(scored, objective)
    groups = Groups.of(torch.from_numpy(rewards), torch.from_numpy(has_reward))
    lam = lam_for(groups, objective.estimator, steering)
    own: Doubles = make_estimator(objective.estimator, lam).advantages(groups).numpy()
    trains = has_reward & (has_reward.sum(axis=1, keepdims=True) >= 2)
    penalty = Penalty(objective, scored, rewards, trains, steering.beta)
    weighed = Weighed(groups, own, penalty, version)
    return _assemble(weighed), describe_batch(weighed, lam)


def _assemble(batch: Weighed) -> RolloutBatch:
    """The completions that train, group by group."""
    scored, trains = batch.scored, batch.trains
    kept = [(scored[g], int(j)) for g, j in zip(*np.nonzero(trains), strict=True)]
    pairs = [(item.group.prompt.token_ids, item.group.completions[j].token_ids) for item, j in kept]
    policies = [item.policy[j] for item, j in kept if item.policy is not None]
    references = [item.reference[j] for item, j in kept if item.reference is not None]
    return RolloutBatch(
        sequences=flatten(pairs),
        advantages=batch.values[trains].astype(np.float32),
        betas=batch.penalty.per_token[trains],
        behaviour=_concatenate([item.group.completions[j].logprobs for item, j in kept]),
        old=_concatenate(policies) if scored[0].policy is not None else None,
        reference=_concatenate(references) if scored[0].reference is not None else None,
        fresh=np.array([item.group.policy_version == batch.version for item, _ in kept], dtype=bool),
    )


def staleness_of(completions: Sequence[Completion], version: int) -> Ints:
    """Of each of their tokens, one completion after the other: how many updates older than `version` the
    policy was that drew it."""
    return version - np.concatenate([completion.versions for completion in completions])


def _concatenate(arrays: list[Floats]) -> Floats:
    return np.concatenate(arrays).astype(np.float32) if arrays else np.zeros(0, np.float32)


@dataclass(frozen=True)
class Weighed:
    """The groups of a step with what training makes of them, all `[G, k]`."""

    groups: Groups
    """Their rewards."""
    own: Doubles
    """The estimator's advantages."""
    penalty: Penalty
    version: int
    """Of the policy that is updated."""

    @property
    def scored(self) -> Sequence[ScoredGroup]:
        return self.penalty.scored

    @property
    def trains(self) -> Mask:
        return self.penalty.trains

    @cached_property
    def values(self) -> Doubles:
        """Advantages with the penalty."""
        return self.own + self.penalty.of_advantages


def describe_batch(batch: Weighed, lam: float | None) -> BatchStats:
    scored, trains = batch.scored, batch.trains
    completions = list(itertools.chain.from_iterable(item.group.completions for item in scored))
    rewards = list(itertools.chain.from_iterable(item.rewards for item in scored))
    tasks = itertools.chain.from_iterable([s.group.prompt.task] * len(s.rewards) for s in scored)
    drawn = [r.total for r in rewards if r.total is not None]
    lengths = [len(c.token_ids) for c in completions]
    staleness = staleness_of(completions, batch.version)
    whole = np.flatnonzero(trains.any(axis=1))
    values = batch.groups.values.numpy()
    spreads = np.array([values[g][trains[g]].std() for g in whole])
    radius, effective = mean_tilt(batch, lam)
    return BatchStats(
        reward=_mean_or(float("nan"), drawn),
        reward_std=float(np.std(drawn)) if drawn else 0.0,
        group_std=_mean_or(0.0, spreads),
        equal_groups=_mean_or(1.0, spreads < 1e-9),
        advantage_std=float(batch.values[trains].std()) if trains.any() else 0.0,
        non_monotone=non_monotone_share(batch.groups, torch.from_numpy(batch.own)),
        beta=batch.penalty.beta,
        gate=batch.penalty.describe_gate(),
        lam=lam,
        radius=radius,
        effective_samples=effective,
        length=float(np.mean(lengths)),
        cut_share=float(np.mean([c.finish_reason == "length" for c in completions])),
        failed_rewards=len(rewards) - len(drawn),
        dropped_groups=len(scored) - len(whole),
        num_prompts=len(scored),
        num_completions=len(completions),
        num_tokens=sum(lengths),
        staleness=float(staleness.mean()),
        max_staleness=int(staleness.max()),
        reward_parts=means_of(itertools.chain.from_iterable(r.parts.items() for r in rewards)),
        reward_tasks=means_of((task, r.total) for task, r in zip(tasks, rewards, strict=True)),
        errors=reasons_of(r.error for r in rewards),
    )


def mean_tilt(batch: Weighed, lam: float | None) -> tuple[float | None, float | None]:
    """Mean over groups of the tilt's radius, nats, and of its effective samples; None without a temperature
    or a group."""
    if lam is None or not batch.trains.any():
        return None, None
    radius, effective = measure_tilt(batch.groups, lam)
    return float(radius.mean()), float(effective.mean())


def _mean_or(default: float, values: Sequence[float] | NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else default


def means_of(values: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Mean by name; a name without any value is left out."""
    given: dict[str, list[float]] = {}
    for name, value in values:
        if value is not None:
            given.setdefault(name, []).append(value)
    return {name: float(np.mean(of)) for name, of in sorted(given.items())}


def reasons_of(errors: Iterable[str | None], most: int = 3) -> tuple[str, ...]:
    """The first few different reasons why rewards failed, each once and no longer than a paragraph."""
    return tuple(dict.fromkeys(e[:300] for e in errors if e))[:most]
