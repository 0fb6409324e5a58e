"""Advantages and losses of FRPO and its neighbours (arXiv 2602.08813; equation numbers are the paper's).

Imports torch alone. Advantages are computed per group of k completions, in float64, before any batch is cut;
the loss is the ordinary clipped policy gradient, so micro-batches and ranks may split groups freely.

Names end in the axes of their tensor where a line has several: g groups, j completions of a group (k of
them), i the completion that is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Scale = Literal["exact", "unit", "code"]
Importance = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Penalty = Literal["k3", "token", "reverse"]


@dataclass(frozen=True)
class Groups:
    """A number for each completion of each group (a reward, or a log-ratio), checked once by `of`."""

    values: Tensor
    """`[G, k]` float64, 0 where masked."""
    mask: Tensor
    """`[G, k]` bool: True where there is a value."""
    count: Tensor
    """`[G, 1]` float64: values of each group."""

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None) -> Groups:
        """values `[G, k]` of any float dtype; mask None: all count.

        Raises ValueError for k < 2, another shape of the mask, or a value that is not finite and not masked.
        """
        if values.ndim != 2 or values.shape[1] < 2:
            raise ValueError(f"rewards: shape {tuple(values.shape)}; need [groups, k] with k >= 2")
        if mask is None:
            mask = torch.ones_like(values, dtype=torch.bool)
        elif mask.shape != values.shape:
            raise ValueError(
                f"mask: shape {tuple(mask.shape)}; need the shape of rewards, {tuple(values.shape)}"
            )
        values = torch.where(mask, values.to(torch.float64), 0.0)
        if not torch.isfinite(values).all():
            raise ValueError("rewards: not finite; mask failed rewards instead of passing NaN or infinity")
        return cls(values, mask, mask.sum(dim=1, keepdim=True).to(torch.float64))

    @property
    def mean(self) -> Tensor:
        """`[G, 1]`, over the values of each group; 0 where there are none."""
        return self.values.sum(dim=1, keepdim=True) / self.count.clamp(min=1)

    def only_pairs(self, advantages: Tensor) -> Tensor:
        """`[G, k]` advantages with 0 where masked, and in groups with fewer than two values."""
        return torch.where(self.mask & (self.count >= 2), advantages, 0.0)


class Estimator(Protocol):
    """An advantage estimator is a value: its settings, and what it makes of the rewards of groups."""

    def advantages(self, groups: Groups) -> Tensor:
        """`[G, k]` float64 in reward units; 0 where masked, and in groups with fewer than two rewards."""
        ...


@dataclass(frozen=True)
class Frpo:
    """A_j = s(lam) (1 - k c_j): the closed form of the gradient of the group's entropic risk at ratio 1.

    With several updates per batch this keeps the advantage and clips each completion's ratio, as GRPO does;
    the paper's loss reweights the group by the moved ratios instead. Raises ValueError for lam <= 0.
    """

    lam: float
    """Temperature, reward units."""
    jackknife: bool = True
    """Remove the leading bias of the group's tilted policy (4.3)."""
    scale: Scale = "code"
    """s: exact = lam, unit = 1 (the paper's text), code = max(lam, 1) (the released code)."""

    def advantages(self, groups: Groups) -> Tensor:
        c = tilted_weights(groups, self.lam, jackknife=self.jackknife)
        factor = {"exact": self.lam, "unit": 1.0, "code": max(self.lam, 1.0)}[self.scale]
        return groups.only_pairs(factor * (1 - groups.count * c))


@dataclass(frozen=True)
class Grpo:
    """A_j = r_j - mean of the group; without the division by std it is Dr. GRPO (arXiv 2503.20783)."""

    normalize_std: bool = False
    """Divide by the group's (sample) standard deviation + 1e-6."""

    def advantages(self, groups: Groups) -> Tensor:
        centred = torch.where(groups.mask, groups.values - groups.mean, 0.0)
        if self.normalize_std:
            squares = centred.square().sum(dim=1, keepdim=True)
            centred = centred / ((squares / (groups.count - 1).clamp(min=1)).sqrt() + 1e-6)
        return groups.only_pairs(centred)


@dataclass(frozen=True)
class Rloo:
    """A_j = r_j - mean of the other rewards of the group (arXiv 2402.14740)."""

    def advantages(self, groups: Groups) -> Tensor:
        centred = groups.values - groups.mean
        return groups.only_pairs(centred * groups.count / (groups.count - 1).clamp(min=1))


def tilted_weights(groups: Groups, lam: float, *, jackknife: bool) -> Tensor:
    """c_j of the tilted policy on the sample, float64 `[G, k]`: each row sums to 1 over its rewards, and is 0
    where masked. Entries below 0 occur with the jackknife.

    lam is a temperature in reward units; raises ValueError for lam <= 0. Log-softmax alone: exp(-r / lam)
    itself overflows at small lam.
    """
    if not lam > 0:
        raise ValueError(f"lam: {lam}; need a temperature > 0")
    mask, count = groups.mask, groups.count
    # z_j = -(r_j - min r) / lam: the softmax is the same, and the worst completion has z = 0
    worst = torch.where(mask, groups.values, torch.inf).amin(dim=1, keepdim=True)
    worst = torch.where(worst.isfinite(), worst, 0.0)
    z_gj = torch.where(mask, -(groups.values - worst) / lam, -torch.inf)
    # plug-in: c_j = p_j = softmax_j(z)
    empty = ~mask.any(dim=1, keepdim=True)
    c_gj = torch.softmax(torch.where(empty, 0.0, z_gj), dim=1)
    if jackknife:
        # (4.3): c_j = k p_j - (k - 1) / k sum_i q(i)_j
        q_gij = _weights_without_each(z_gj, mask, count)
        c_gj = count * c_gj - (count - 1) / count.clamp(min=1) * q_gij.sum(dim=1)
    return torch.where(mask, c_gj, 0.0)


def _weights_without_each(z_gj: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """q(i)_j = softmax over the group without completion i, 0 for j = i; `[G, k, k]`, 0 for every i that is
    masked or alone."""
    k = z_gj.shape[1]
    itself_ij = torch.eye(k, dtype=torch.bool, device=z_gj.device)
    z_gij = z_gj[:, None, :].expand(-1, k, -1).masked_fill(itself_ij, -torch.inf)
    defined = mask[:, :, None] & (count[:, :, None] >= 2)
    return torch.where(defined, torch.softmax(torch.where(defined, z_gij, 0.0), dim=2), 0.0)


def measure_tilt(groups: Groups, lam: float) -> tuple[Tensor, Tensor]:
    """How far the tilted policy p = softmax(-r / lam) is from the sample, per group of at least two rewards.

    Returns float64 `[G]` radius, KL(p || uniform) = log k + sum p log p in nats, and `[G]` effective sample
    size 1 / sum p^2, between 1 (the gradient rests on one completion) and the number of rewards.
    """
    whole = groups.count[:, 0] >= 2
    p = tilted_weights(groups, lam, jackknife=False)[whole]
    count = groups.count[whole, 0]
    return count.log() + torch.xlogy(p, p).sum(dim=1), 1 / p.square().sum(dim=1)


LAM_FLOOR = 0.02
"""Reward units: lam goes no lower where a batch cannot reach its radius."""
BISECTIONS = 60
LARGEST_LOG_LAM = 700.0
"""exp(710) is beyond a double."""


def lam_of_radius(groups: Groups, rho: float, *, floor: float = LAM_FLOOR) -> float:
    """The lam at which the mean over groups of KL(p || uniform) is rho nats (radius mode), by bisection in
    log lam.

    The KL falls as lam grows. Where the batch cannot reach rho (ties for the least reward, equal groups), lam
    is `floor`.
    """

    def mean_radius(log_lam: float) -> float:
        radius, _ = measure_tilt(groups, math.exp(log_lam))
        return float(radius.mean()) if len(radius) else 0.0

    low = math.log(floor)
    if mean_radius(low) <= rho:
        return floor
    largest = float(groups.values.abs().max())
    high = min(LARGEST_LOG_LAM, low + 40 + math.log1p(largest))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if mean_radius(middle) > rho:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def reverse_penalty(log_ratios: Groups, beta: Tensor) -> Tensor:
    """Advantage that descends KL(policy || reference): -beta (D_j - mean of the group's D), float64 `[G, k]`.

    `log_ratios` are D_j = sum over tokens of log policy - log reference, nats per completion, detached, of
    those that pay; `beta` `[G, 1]`. Where only the successes S pay, it descends pi(S) KL(policy given S ||
    reference given S), with pi(S) held fixed: nothing pulls failures back.
    """
    return -beta * Grpo(normalize_std=False).advantages(log_ratios)


def non_monotone_share(groups: Groups, advantages: Tensor) -> float:
    """Share of groups in which some completion has a higher reward and a lower advantage than another."""
    if not len(groups.values):
        return 0.0
    advantages = advantages.double()
    both = groups.mask[:, :, None] & groups.mask[:, None, :]
    higher = groups.values[:, :, None] > groups.values[:, None, :]
    lower = advantages[:, :, None] < advantages[:, None, :] - 1e-9
    return float((both & higher & lower).any(dim=2).any(dim=1).double().mean())


@dataclass(frozen=True)
class TokenTerms:
    """Log-probs of the tokens of a micro-batch, `[N, T]` nats each."""

    now: Tensor
    """Under the current policy, with gradient."""
    old: Tensor
    """Under the learner before the first update of the batch."""
    behaviour: Tensor
    """Under the rollout engine that drew them."""
    reference: Tensor | None
    """Under the frozen reference; None: no penalty."""
    mask: Tensor
    """bool: tokens of completions."""


@dataclass(frozen=True)
class Surrogate:
    """What is descended."""

    ratio: Literal["token", "sequence"]
    """Importance ratio per token (PPO), or the geometric mean of a completion's (GSPO)."""
    clip_low: float
    clip_high: float
    """Ratios are clipped to [1 - clip_low, 1 + clip_high]."""
    importance: Importance
    """What becomes of an importance weight exp(old - behaviour) above the cap."""
    importance_cap: float
    aggregation: Literal["completion", "token", "sum"]
    """Which of the denominators a token's term is divided by."""
    penalty: Penalty = "k3"
    """What a token pays: k3, whose gradient is that of KL(reference || policy), or k3 times its importance
    ratio, whose gradient is that of the token's own KL(policy || reference). reverse: nothing, it is in the
    advantages."""


@dataclass(frozen=True)
class Weights:
    """Of each completion of a micro-batch, `[N]`."""

    advantages: Tensor
    """Reward units."""
    betas: Tensor
    """Of the penalty of its tokens, reward units per nat."""


@dataclass(frozen=True)
class Denominators:
    """Of the whole batch over all ranks, so that any cut of the batch adds up to the same gradient."""

    num_completions: int
    num_tokens: int
    max_tokens: int
    """Length limit of a completion."""


@dataclass(frozen=True)
class LossTerms:
    """Sums over a micro-batch; `loss` is what to differentiate, already divided by the global denominator."""

    loss: Tensor
    penalty_sum: Tensor
    """k3 summed over tokens, nats, detached."""
    clipped: Tensor
    """Number of tokens whose clipped branch was active."""
    capped: Tensor
    """Number of tokens whose importance weight was above the cap."""


def policy_loss(
    tokens: TokenTerms, weights: Weights, surrogate: Surrogate, denominators: Denominators
) -> LossTerms:
    """Clipped policy gradient with truncated importance weights and an optional penalty of each token, for
    one micro-batch."""
    now, mask = tokens.now, tokens.mask
    weight = mask.to(now.dtype)
    ratio = _log_ratio(tokens, weight, surrogate.ratio).exp()
    a = weights.advantages[:, None].to(now.dtype)
    # -min(ratio A, clip(ratio) A) w
    free = ratio * a
    limited = ratio.clamp(1 - surrogate.clip_low, 1 + surrogate.clip_high) * a
    importance, capped = importance_weights(tokens, surrogate.importance, surrogate.importance_cap)
    per_token = -torch.minimum(free, limited) * importance
    penalty_sum = now.new_zeros(())
    if tokens.reference is not None and surrogate.penalty != "reverse":
        # k3 = exp(d) - d - 1, with d = log reference - log policy
        delta = (tokens.reference - now) * weight
        k3 = delta.exp() - delta - 1
        cost = k3
        if surrogate.penalty == "token":
            cost = k3 * _log_ratio(tokens, weight, "token").exp() * importance
        per_token = per_token + weights.betas[:, None].to(now.dtype) * cost
        penalty_sum = (k3 * weight).sum().detach()
    clipped = (limited < free) & mask
    loss = _aggregate(per_token * weight, weight, surrogate.aggregation, denominators)
    return LossTerms(loss, penalty_sum, clipped.sum().detach(), capped.sum())


def kl_from_start(now: Tensor, start: Tensor) -> Tensor:
    """Estimate of KL(start || policy), nats, summed over tokens that the start drew.

    `now` and `start` are their log-probs `[N, T]`, equal where there is no token. With r = policy / start a
    token gives r - 1 - log r (k3), whose mean over what the start draws there is the KL of the next token:
    E[r] = 1. The gradient is as unbiased, and of every single token 0 where the policies agree.
    """
    log_ratio = now - start
    return (torch.expm1(log_ratio) - log_ratio).sum()


def importance_weights(tokens: TokenTerms, kind: Importance, cap: float) -> tuple[Tensor, Tensor]:
    """w of each token `[N, T]`, without gradient, and where it was above the cap `[N, T]`.

    The weight exp(old - behaviour) makes an average over what older weights, or another implementation of
    these, drew one over the policy that is updated. By token it is each token's own (biased, of bounded
    variance: arXiv 2505.24298 eq. 5); by sequence the product over the completion, which is exact but for the
    cap. Truncation keeps what is above the cap at it; a mask leaves it out.
    """
    weight = tokens.mask.to(tokens.old.dtype)
    log_weight = (tokens.old - tokens.behaviour).detach() * weight
    if kind in ("sequence_truncate", "sequence_mask"):
        log_weight = log_weight.sum(dim=1, keepdim=True).expand_as(log_weight)
    own = log_weight.exp()
    capped = (own > cap) & tokens.mask
    if kind in ("token_mask", "sequence_mask"):
        return torch.where(capped, 0.0, own), capped
    return own.clamp(max=cap), capped


def _log_ratio(tokens: TokenTerms, weight: Tensor, per: Literal["token", "sequence"]) -> Tensor:
    """log policy - log old `[N, T]`, of each token or the mean over its completion's."""
    log_ratio = (tokens.now - tokens.old) * weight
    if per == "token":
        return log_ratio
    lengths = weight.sum(dim=1, keepdim=True).clamp(min=1)
    return (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(tokens.now)


def _aggregate(
    per_token: Tensor,
    weight: Tensor,
    aggregation: Literal["completion", "token", "sum"],
    denominators: Denominators,
) -> Tensor:
    """completion: the mean over a completion's tokens, then over completions. token: the mean over all
    tokens. sum: over a constant length (the gradient of the objective, Dr. GRPO)."""
    if aggregation == "completion":
        means = per_token.sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return means.sum() / denominators.num_completions
    if aggregation == "token":
        return per_token.sum() / denominators.num_tokens
    return per_token.sum() / (denominators.num_completions * denominators.max_tokens)
