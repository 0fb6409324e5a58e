"""Advantages and losses of FRPO and its neighbours (arXiv 2602.08813; equation numbers are the paper's).

Imports torch alone. Advantages are computed per group of k completions, in float64, before any batch is cut;
the loss is the ordinary clipped policy gradient, so micro-batches and ranks may split groups freely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["exact", "unit", "code"]


def _prepare(rewards: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """float64 rewards with masked entries 0, the mask, and the float64 number of rewards per group [G, 1]."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}; need [groups, k] with k >= 2")
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    elif mask.shape != rewards.shape:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)}; need the shape of rewards, {tuple(rewards.shape)}"
        )
    values = torch.where(mask, rewards.to(torch.float64), 0.0)
    if not torch.isfinite(values).all():
        raise ValueError("rewards: not finite; mask failed rewards instead of passing NaN or infinity")
    return values, mask, mask.sum(dim=1, keepdim=True).to(torch.float64)


def _finish(advantages: Tensor, mask: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask & (count >= 2), advantages, 0.0).to(dtype)


def tilted_weights(rewards: Tensor, lam: float, *, jackknife: bool, mask: Tensor | None = None) -> Tensor:
    """c_j of the tilted policy on the sample: each row sums to 1 over its rewards; negative entries occur
    with jackknife.

    rewards `[groups, k]`, lam in reward units. Returns float64 `[groups, k]`, 0 where masked.
    Plug-in: softmax(-r / lam). Jackknife (4.3): k p_j - (k-1)/k sum over i != j of the softmax without i.
    """
    values, mask, count = _prepare(rewards, mask)
    if not lam > 0:
        raise ValueError(f"lam: {lam}; need a temperature > 0")
    low = torch.where(mask, values, torch.inf).amin(dim=1, keepdim=True)
    logits = torch.where(mask, -(values - torch.where(low.isfinite(), low, 0.0)) / lam, -torch.inf)
    alone = ~mask.any(dim=1, keepdim=True)
    p = torch.softmax(torch.where(alone, 0.0, logits), dim=1)
    if jackknife:
        k = values.shape[1]
        without = (
            logits[:, None, :]
            .expand(-1, k, -1)
            .masked_fill(torch.eye(k, dtype=torch.bool, device=values.device), -torch.inf)
        )
        defined = mask[:, :, None] & (count[:, :, None] >= 2)
        q = torch.where(defined, torch.softmax(torch.where(defined, without, 0.0), dim=2), 0.0)
        p = count * p - (count - 1) / count.clamp(min=1) * q.sum(dim=1)
    return torch.where(mask, p, 0.0)


def frpo_advantages(
    rewards: Tensor, lam: float, *, jackknife: bool, scale: Scale, mask: Tensor | None = None
) -> Tensor:
    """A_j = s(lam) (1 - k c_j): the closed form of the gradient of the group's entropic risk at ratio 1.

    rewards `[groups, k]` float, lam > 0 in reward units, mask `[groups, k]` bool (True = has a reward; None =
    all). `scale` is s: exact = lam, unit = 1 (the paper's text), code = max(lam, 1) (the released code).
    Returns the shape and dtype of rewards; masked completions, and groups with fewer than two rewards, get 0.
    With several updates per batch this keeps the advantage and clips each completion's ratio, as GRPO does;
    the paper's loss reweights the group by the moved ratios instead. Raises ValueError for k < 2, lam <= 0,
    or a reward that is not finite and not masked.
    """
    c = tilted_weights(rewards, lam, jackknife=jackknife, mask=mask)
    _, mask, count = _prepare(rewards, mask)
    factor = {"exact": lam, "unit": 1.0, "code": max(lam, 1.0)}[scale]
    return _finish(factor * (1 - count * c), mask, count, rewards.dtype)


def tilt(rewards: Tensor, lam: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How far the tilted policy softmax(-r / lam) is from the sample, per group of at least two rewards.

    rewards `[groups, k]`. Returns float64 `[G]` radius, KL(p || uniform) in nats, and `[G]` effective sample
    size 1 / sum p^2, between 1 (the gradient rests on one completion) and the number of rewards.
    """
    p = tilted_weights(rewards, lam, jackknife=False, mask=mask)
    _, mask, count = _prepare(rewards, mask)
    whole = count[:, 0] >= 2
    p, n = p[whole], count[whole, 0]
    return n.log() + torch.xlogy(p, p).sum(dim=1), 1 / p.square().sum(dim=1)


LAM_FLOOR = 0.02
"""Reward units: lam goes no lower where a batch cannot reach its radius."""


def lam_of_radius(
    rewards: Tensor, rho: float, *, floor: float = LAM_FLOOR, mask: Tensor | None = None
) -> float:
    """The lam at which the mean over groups of KL(p || uniform) is rho nats (radius mode), by bisection in
    log lam.

    The KL falls as lam grows. Where the batch cannot reach rho (ties for the least reward, equal groups), lam
    is `floor`.
    """
    values, _, _ = _prepare(rewards, mask)
    largest = float(values.abs().max()) if values.numel() else 0.0
    low, high = (
        math.log(floor),
        min(700.0, math.log(floor) + 40 + math.log1p(largest)),
    )  # exp(710) is beyond a double

    def radius(log_lam: float) -> float:
        found = tilt(rewards, math.exp(log_lam), mask)[0]
        return float(found.mean()) if len(found) else 0.0

    if radius(low) <= rho:
        return floor
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle) > rho else (low, middle)
    return math.exp((low + high) / 2)


def grpo_advantages(rewards: Tensor, *, normalize_std: bool, mask: Tensor | None = None) -> Tensor:
    """r_j - mean of the group, divided by its (sample) standard deviation + 1e-6 if `normalize_std`.

    Without the division this is Dr. GRPO (arXiv 2503.20783). Shapes, mask and errors as in `frpo_advantages`.
    """
    values, mask, count = _prepare(rewards, mask)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(mask, values - mean, 0.0)
    if normalize_std:
        std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + 1e-6)
    return _finish(centred, mask, count, rewards.dtype)


def rloo_advantages(rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """r_j - mean of the other rewards of the group (RLOO, arXiv 2402.14740). Otherwise as
    `frpo_advantages`."""
    values, mask, count = _prepare(rewards, mask)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    return _finish((values - mean) * count / (count - 1).clamp(min=1), mask, count, rewards.dtype)


def reverse_penalty(log_ratio: Tensor, beta: float, *, mask: Tensor | None = None) -> Tensor:
    """Advantage that descends KL(policy || reference): -beta (D_j - mean of the group's D).

    log_ratio `[groups, k]` is D_j = sum over tokens of log policy - log reference, nats per completion,
    detached.
    """
    return -beta * grpo_advantages(log_ratio, normalize_std=False, mask=mask)


def non_monotone_share(rewards: Tensor, advantages: Tensor, mask: Tensor | None = None) -> float:
    """Share of groups in which some completion has a higher reward and a lower advantage than another."""
    values, mask, _ = _prepare(rewards, mask)
    both = mask[:, :, None] & mask[:, None, :]
    higher = values[:, :, None] > values[:, None, :]
    lower = advantages.double()[:, :, None] < advantages.double()[:, None, :] - 1e-9
    return float((both & higher & lower).any(dim=2).any(dim=1).double().mean()) if len(values) else 0.0


@dataclass(frozen=True)
class LossTerms:
    """Sums over a micro-batch; `loss` is what to differentiate, already divided by the global denominator."""

    loss: Tensor
    penalty_sum: Tensor
    """k3 summed over tokens, nats, detached."""
    clipped: Tensor
    """Number of tokens whose clipped branch was active."""


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    behaviour: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    beta: float,
    ratio: Literal["token", "sequence"],
    clip_low: float,
    clip_high: float,
    importance_cap: float,
    aggregation: Literal["completion", "token", "sum"],
    num_completions: int,
    num_tokens: int,
    max_tokens: int,
) -> LossTerms:
    """Clipped policy gradient with truncated importance weights and an optional k3 penalty, for one
    micro-batch.

    logprobs, old, behaviour, reference `[N, T]` nats: the current policy (with gradient), the learner before
    the first update of the batch, the rollout engine, the frozen reference (None: no k3 penalty). advantages
    `[N]`, mask `[N, T]` bool. The three denominators are those of the whole batch over all ranks, so that any
    cut of the batch adds up to the same gradient: completion = mean over a completion's tokens, then over
    `num_completions`; token = over `num_tokens`; sum = over `num_completions * max_tokens` (a constant: the
    gradient of the objective, Dr. GRPO).
    """
    weight = mask.to(logprobs.dtype)
    log_ratio = (logprobs - old) * weight
    if ratio == "sequence":
        lengths = weight.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(logprobs)
    r = log_ratio.exp()
    a = advantages[:, None].to(logprobs.dtype)
    surrogate, limited = r * a, r.clamp(1 - clip_low, 1 + clip_high) * a
    clipped = (limited < surrogate) & mask
    importance = ((old - behaviour) * weight).exp().clamp(max=importance_cap).detach()
    per_token = -torch.minimum(surrogate, limited) * importance
    penalty_sum = logprobs.new_zeros(())
    if reference is not None:
        delta = (reference - logprobs) * weight
        k3 = delta.exp() - delta - 1
        per_token = per_token + beta * k3
        penalty_sum = (k3 * weight).sum().detach()
    if aggregation == "completion":
        loss = ((per_token * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)).sum() / num_completions
    elif aggregation == "token":
        loss = (per_token * weight).sum() / num_tokens
    else:
        loss = (per_token * weight).sum() / (num_completions * max_tokens)
    return LossTerms(loss, penalty_sum, clipped.sum().detach())
