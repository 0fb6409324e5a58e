"""From scored groups to the batch that the learner trains on: who counts, with what advantage. Pure
functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from frpo.config import ObjectiveConfig
from frpo.objective import (
    frpo_advantages,
    grpo_advantages,
    non_monotone_share,
    reverse_penalty,
    rloo_advantages,
    tilt,
)
from frpo.steering import begin, lam_for
from frpo.types import Floats, Group, RolloutBatch, ScoredGroup, Sequences, Steering

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class BatchStats:
    """What the batch looked like before the update. Rewards over completions that have one."""

    reward: float
    reward_std: float
    group_std: float
    equal_groups: float
    advantage_std: float
    non_monotone: float
    beta: float
    lam: float | None
    radius: float | None
    effective_samples: float | None
    length: float
    cut_share: float
    failed_rewards: int
    dropped_groups: int
    """Left with fewer than two completions that train."""
    num_groups: int
    num_completions: int
    num_tokens: int
    parts: dict[str, float]
    tasks: dict[str, float]
    errors: tuple[str, ...]
    """The first different reasons why rewards failed."""


def flatten(pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> Sequences:
    """Pack (prompt ids, completion ids) pairs into flat arrays."""
    parts = [ids for pair in pairs for ids in pair]
    return Sequences(
        tokens=np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32),
        prompt_lengths=np.array([len(p) for p, _ in pairs], dtype=np.int32),
        lengths=np.array([len(p) + len(c) for p, c in pairs], dtype=np.int32),
    )


def rewards_and_mask(
    scored: Sequence[ScoredGroup], objective: ObjectiveConfig
) -> tuple[Doubles, NDArray[np.bool_]]:
    """Rewards `[G, k]` (0 where there is none) and the mask of those that train.

    A failed reward leaves its group. A completion ended by the length limit leaves it too under cut: mask,
    and is lowered by cut_penalty under cut: penalise.
    """
    k = len(scored[0].rewards)
    rewards, mask = np.zeros((len(scored), k)), np.zeros((len(scored), k), dtype=bool)
    for g, item in enumerate(scored):
        for j, (reward, completion) in enumerate(zip(item.rewards, item.group.completions, strict=True)):
            cut = completion.finish_reason == "length"
            if reward.total is None or (cut and objective.cut == "mask"):
                continue
            rewards[g, j] = reward.total - (
                objective.cut_penalty if cut and objective.cut == "penalise" else 0.0
            )
            mask[g, j] = True
    return rewards, mask


def log_ratios(scored: Sequence[ScoredGroup]) -> Doubles | None:
    """D `[G, k]`: sum over tokens of log policy - log reference, nats per completion; None where either was
    not asked for."""
    if any(s.policy is None or s.reference is None for s in scored):
        return None
    return np.array(
        [
            [
                float((p.astype(np.float64) - r).sum())
                for p, r in zip(s.policy or (), s.reference or (), strict=True)
            ]
            for s in scored
        ]
    )


def blocks_of(groups: Sequence[Group], budget_tokens: int) -> list[list[Group]]:
    """Neighbours that are scored together, up to `budget_tokens` or one group: the same whoever scores them,
    so that a policy's log-probs differ from themselves by nothing, in bfloat16 too."""
    found: list[list[Group]] = []
    room = 0
    for group in groups:
        size = sum(len(group.prompt.token_ids) + len(c.token_ids) for c in group.completions)
        if not found or size > room:
            found.append([])
            room = budget_tokens
        found[-1].append(group)
        room -= size
    return found


def advantages(rewards: Doubles, mask: NDArray[np.bool_], objective: ObjectiveConfig, lam: float) -> Doubles:
    """The method's advantage of each completion `[G, k]`; 0 for those that do not train."""
    r, m = torch.from_numpy(rewards), torch.from_numpy(mask)
    if objective.method == "frpo":
        a = frpo_advantages(r, lam, jackknife=objective.jackknife, scale=objective.scale, mask=m)
    elif objective.method == "rloo":
        a = rloo_advantages(r, mask=m)
    else:
        a = grpo_advantages(r, normalize_std=objective.normalize_std, mask=m)
    result: Doubles = a.numpy()
    return result


def penalties(
    mask: NDArray[np.bool_], divergence: Doubles | None, objective: ObjectiveConfig, beta: float
) -> Doubles:
    """What the reverse penalty adds to each advantage `[G, k]`; 0 where there is none."""
    if divergence is None or objective.penalty != "reverse" or beta == 0:
        return np.zeros(mask.shape)
    result: Doubles = reverse_penalty(torch.from_numpy(divergence), beta, mask=torch.from_numpy(mask)).numpy()
    return result


def make_batch(
    scored: Sequence[ScoredGroup], objective: ObjectiveConfig, steering: Steering | None = None
) -> tuple[RolloutBatch, BatchStats]:
    """Order the groups by prompt index, drop what has no reward, and attach the advantages. `steering` None:
    the first step."""
    scored = sorted(scored, key=lambda s: s.group.index)
    rewards, mask = rewards_and_mask(scored, objective)
    steering = steering or begin(objective)
    lam = lam_for(torch.from_numpy(rewards), torch.from_numpy(mask), objective, steering)
    own = advantages(rewards, mask, objective, lam)
    values = own + penalties(mask, log_ratios(scored), objective, steering.beta)
    mask &= mask.sum(axis=1, keepdims=True) >= 2
    pairs, kept, behaviour, old, reference = [], [], [], [], []
    for g, item in enumerate(scored):
        for j, completion in enumerate(item.group.completions):
            if mask[g, j]:
                pairs.append((item.group.prompt.token_ids, completion.token_ids))
                kept.append(values[g, j])
                behaviour.append(completion.logprobs)
                old += [item.policy[j]] if item.policy is not None else []
                reference += [item.reference[j]] if item.reference is not None else []
    batch = RolloutBatch(
        sequences=flatten(pairs),
        advantages=np.array(kept, dtype=np.float32),
        behaviour=_concatenate(behaviour),
        old=_concatenate(old) if scored[0].policy is not None else None,
        reference=_concatenate(reference) if scored[0].reference is not None else None,
        beta=steering.beta,
    )
    used = lam if objective.method == "frpo" else None
    return batch, _describe(scored, rewards, mask, own, values, used, steering.beta)


def _concatenate(arrays: list[Floats]) -> Floats:
    return np.concatenate(arrays).astype(np.float32) if arrays else np.zeros(0, np.float32)


def _describe(
    scored: Sequence[ScoredGroup],
    rewards: Doubles,
    mask: NDArray[np.bool_],
    own: Doubles,
    values: Doubles,
    lam: float | None,
    beta: float,
) -> BatchStats:
    completions = [c for s in scored for c in s.group.completions]
    totals = [(s.group.prompt.task, r) for s in scored for r in s.rewards]
    drawn = np.array([r.total for _, r in totals if r.total is not None])
    whole = mask.any(axis=1)
    radius, effective = (
        tilt(torch.from_numpy(rewards), lam, torch.from_numpy(mask))
        if lam is not None and whole.any()
        else (None, None)
    )
    spread = np.array([rewards[g][mask[g]].std() for g in np.flatnonzero(whole)])
    parts = sorted({p for _, r in totals for p in r.parts})
    return BatchStats(
        reward=float(drawn.mean()) if len(drawn) else float("nan"),
        reward_std=float(drawn.std()) if len(drawn) else 0.0,
        group_std=float(spread.mean()) if len(spread) else 0.0,
        equal_groups=float((spread < 1e-9).mean()) if len(spread) else 1.0,
        advantage_std=float(values[mask].std()) if mask.any() else 0.0,
        non_monotone=non_monotone_share(
            torch.from_numpy(rewards), torch.from_numpy(own), torch.from_numpy(mask)
        ),
        beta=beta,
        lam=lam,
        radius=float(radius.mean()) if radius is not None else None,
        effective_samples=float(effective.mean()) if effective is not None else None,
        length=float(np.mean([len(c.token_ids) for c in completions])),
        cut_share=float(np.mean([c.finish_reason == "length" for c in completions])),
        failed_rewards=sum(r.total is None for _, r in totals),
        dropped_groups=int((~whole).sum()),
        num_groups=len(scored),
        num_completions=len(completions),
        num_tokens=sum(len(c.token_ids) for c in completions),
        parts=means_of((p, r.parts.get(p)) for p in parts for _, r in totals),
        tasks=means_of((task, r.total) for task, r in totals),
        errors=reasons_of(r.error for _, r in totals),
    )


def means_of(values: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Mean by name; a name without any value is left out."""
    found: dict[str, list[float]] = {}
    for name, value in values:
        if value is not None:
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(of)) for name, of in sorted(found.items())}


def reasons_of(errors: Iterable[str | None], most: int = 3) -> tuple[str, ...]:
    """The first few different reasons why rewards failed, each once and no longer than a paragraph."""
    return tuple(dict.fromkeys(e[:300] for e in errors if e))[:most]
