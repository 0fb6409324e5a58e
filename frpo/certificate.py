"""What a policy's reward can fall to inside a KL ball: the plug-in curve, its interval, and the bound that
holds.

Rewards are those of independent completions drawn at temperature 1, `[prompts, completions]`; radii are in
nats per completion. No policy Q with mean over prompts of KL(Q || policy) <= rho averages less than

    R(rho) = max over lam > 0 of  -lam mean_x log E_{y~policy} exp(-r / lam) - lam rho        (3.5 of arXiv
    2602.08813)

`worst_case_reward` puts the sample in place of E: good for plots, too high for a promise (Jensen, and the
maximum), most so where failures are rare. `reward_lower_bound` is valid at every sample size, by sample
splitting. Imports numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]

SHARES = (0.3, 0.1, 0.03, 0.01, 0.001)
"""tau: the floor of a prompt's c_x as a share of the pooled mean."""
SHRINKAGE = 2.0
"""Draws that the pooled mean counts for when a prompt's own mean is shrunk towards it."""


def _checked_rewards(rewards: ArrayLike, radius: float = 0.0) -> Doubles:
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or r.size == 0:
        raise ValueError(f"rewards: shape {r.shape}; need [prompts, completions], not empty")
    if not np.isfinite(r).all():
        raise ValueError("rewards: not finite; a failed reward counts as the floor of the reward here")
    if not (radius >= 0 and np.isfinite(radius)):
        raise ValueError(f"radius: {radius}; need a number of nats >= 0")
    return r


def _log_mean_exp(x: Doubles, axis: int) -> Doubles:
    top = x.max(axis=axis, keepdims=True)
    log_mean: Doubles = np.log(np.exp(x - top).mean(axis=axis)) + top.squeeze(axis)
    return log_mean


def _largest_spread(r: Doubles) -> float:
    """Between the best and the worst completion of one prompt."""
    return float((r.max(axis=1) - r.min(axis=1)).max())


def tilt_to(rewards: ArrayLike, lam: float) -> tuple[float, float]:
    """Mean reward and mean KL(Q || policy), nats, of the tilted policy Q ~ policy exp(-r / lam) on the
    sample; means over prompts.

    The KL is the radius that training at this lam guards: it stands on the legend of an arm that was given
    lam. Raises ValueError for a lam that is not above 0.

    Example: rewards [[0, 1]] at lam -> 0 give (0, log 2): all of Q lies on the worse of two completions.
    """
    r = _checked_rewards(rewards)
    if not lam > 0:
        raise ValueError(f"lam: {lam}; need a temperature > 0")
    logits = -(r - r.min(axis=1, keepdims=True)) / lam
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    kl = np.log(r.shape[1]) + (p * log_p).sum(axis=1)  # sum p log(p / (1 / k))
    return float((p * r).sum(axis=1).mean()), float(max(0.0, kl.mean()))


def worst_case_reward(rewards: ArrayLike, radius: float) -> float:
    """Least mean reward of any reweighting of the sample within `radius` nats of mean KL, one multiplier for
    all prompts.

    rewards `[prompts, completions]`. Radius 0 gives the mean; from the radius on that the worst completions
    of each prompt need, the mean of the prompts' least rewards. Exact to 1e-9 of the rewards' range
    (bisection on lam). This is the plug-in estimate of R(radius), not a promise: see `reward_lower_bound`.
    """
    r = _checked_rewards(rewards, radius)
    spread = _largest_spread(r)
    if radius == 0 or spread == 0:
        return float(r.mean())
    least = r.min(axis=1, keepdims=True)
    if radius >= float(np.log(r.shape[1] / (r == least).sum(axis=1)).mean()):
        return float(least.mean())
    lam = _lam_of_radius(r, radius, spread)
    # -lam mean_x log E exp(-r / lam) - lam rho, with the least reward of each prompt taken out of the log
    dual = least[:, 0].mean() - lam * (_log_mean_exp(-(r - least) / lam, 1).mean() + radius)
    return float(min(max(dual, least.mean()), r.mean()))


def _lam_of_radius(r: Doubles, radius: float, spread: float) -> float:
    """The temperature whose tilted policy lies `radius` nats away: a bisection, as the KL falls in lam."""
    low = np.log(spread * 1e-9)
    high = np.log(spread * 1e9)
    for _ in range(200):
        middle = (low + high) / 2
        _, kl = tilt_to(r, float(np.exp(middle)))
        if kl > radius:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Curve:
    """R on a grid of radii, M of them; all arrays `[M]`, float64."""

    radii: Doubles
    """nats"""
    plug_in: Doubles
    lo: Doubles
    hi: Doubles
    """Bootstrap interval of the plug-in: without width where no failure was drawn, whatever the truth."""
    certified: Doubles
    """Lower bound, valid for all radii of the grid at once; at the floor nothing is promised."""


def curve_of(
    rewards: ArrayLike,
    radii: ArrayLike,
    *,
    floor: float,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Curve:
    """Both estimates on a grid of radii, nats, that was fixed beforehand."""
    r = _checked_rewards(rewards)
    grid = np.asarray(radii, dtype=np.float64)
    lo, hi = bootstrap_curve(r, grid, confidence=confidence, draws=draws, seed=seed)
    each = 1 - (1 - confidence) / len(grid)  # Bonferroni: all radii hold at once
    return Curve(
        radii=grid,
        plug_in=np.array([worst_case_reward(r, float(x)) for x in grid]),
        lo=lo,
        hi=hi,
        certified=np.array([reward_lower_bound(r, float(x), floor=floor, confidence=each) for x in grid]),
    )


def bootstrap_curve(
    rewards: ArrayLike, radii: ArrayLike, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[Doubles, Doubles]:
    """Percentile interval `[M]`, `[M]` of the plug-in curve, resampling prompts and within them completions.

    On a grid of 128 temperatures, which costs at most 1e-3 of the rewards' range.
    """
    r = _checked_rewards(rewards)
    grid = np.asarray(radii, dtype=np.float64)
    spread = _largest_spread(r)
    if spread == 0:  # only the choice of prompts varies, and no radius matters
        spread = 1.0
    prompts, k = r.shape
    lams = spread * np.geomspace(2e-3, 1e4, 128)  # exp(-1 / 2e-3) does not underflow
    least = r.min(axis=1, keepdims=True)
    z = np.exp(-(r - least)[None] / lams[:, None, None])  # [lam, prompt, completion]
    rng = np.random.default_rng(seed)
    curves = np.empty((draws, len(grid)))
    for i in range(draws):
        counts = rng.multinomial(k, np.full(k, 1 / k), size=prompts)
        weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts)) / prompts
        log_mean = np.log(np.einsum("lxy,xy->lx", z, counts / k))
        dual = (weights @ least[:, 0]) - lams * (log_mean @ weights)
        curves[i] = (dual[:, None] - lams[:, None] * grid[None]).max(axis=0)
        curves[i, grid == 0] = weights @ (r * counts / k).sum(axis=1)
    tail = (1 - confidence) / 2
    lo, hi = np.quantile(curves, [tail, 1 - tail], axis=0)
    return lo, hi


def binomial_upper(mean: ArrayLike, n: int, log_inverse_delta: float) -> Doubles:
    """Largest q with n kl(mean, q) <= log(1/delta), kl of Bernoullis: the Hoeffding-Chernoff upper bound of
    the mean of n independent variables in [0, 1], which need not be alike."""
    v = np.clip(np.asarray(mean, dtype=np.float64), 0.0, 1.0)
    low = v.copy()
    high = np.ones_like(v)
    budget = log_inverse_delta / n
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(v > 0, v * np.log(v), 0.0) + np.where(v < 1, (1 - v) * np.log1p(-v), 0.0)
        for _ in range(80):
            q = (low + high) / 2
            cross = np.where(v > 0, v * np.log(q), 0.0) + np.where(v < 1, (1 - v) * np.log1p(-q), 0.0)
            inside = own - cross <= budget  # kl(v, q) = own - cross
            low = np.where(inside, q, low)
            high = np.where(inside, high, q)
    return high


def reward_lower_bound(rewards: ArrayLike, radius: float, *, floor: float, confidence: float = 0.95) -> float:
    """A number that R(radius) is not below, with probability >= `confidence` over the draws, at every sample
    size.

    rewards `[prompts, completions]`, completions >= 2, independent draws that were not used to choose the
    policy, none below `floor`; the statement is about these prompts. Never below `floor`; at `floor` nothing
    can be promised at this radius with so few completions. Raises ValueError for a reward below the floor or
    a single completion.

    z = exp(-(r - floor) / lam) lies in (0, 1]. Half A of the completions chooses lam and a reference c_x per
    prompt; with half B, Jensen and a Chernoff bound on the mean of v = z min(c) / c_x in [0, 1] give R >=
    floor - lam (mean_x log c_x + log u + radius), u = v_up / min(c), for any lam and c > 0.
    """
    r = _checked_rewards(rewards, radius)
    if r.shape[1] < 2:
        raise ValueError(
            "rewards: one completion per prompt; the bound needs at least 2, half to choose and half to bound"
        )
    if (r < floor).any():
        raise ValueError(
            f"floor: {floor} is above the reward {r.min()}; give the least value that the reward can take"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}; need a share between 0 and 1")
    half = r.shape[1] // 2
    chooses = r[:, :half] - floor
    bounds = r[:, half:] - floor
    spread = float(chooses.max())
    if spread == 0:
        return float(floor)
    log_inverse_delta = float(-np.log1p(-confidence))
    lams = spread * np.geomspace(0.01, 1e3, 61)
    own = _log_mean_exp(-chooses[None] / lams[:, None, None], 2)  # [lam, prompt]
    log_c = _reference_means(own, half)  # [choice, lam, prompt]
    expected = _bound_of(own, lams, log_c, radius, bounds.size, log_inverse_delta)  # [choice, lam]
    choice, at = np.unravel_index(expected.argmax(), expected.shape)
    lam = lams[at : at + 1]
    fresh = _log_mean_exp(-bounds / lam, 1)[None]  # [1, prompt]
    bound = _bound_of(fresh, lam, log_c[choice, at][None], radius, bounds.size, log_inverse_delta)
    return float(floor + max(0.0, float(bound[0])))


def _reference_means(own: Doubles, count: int) -> Doubles:
    """The log c_x to choose from `[1 + SHARES, lam, prompt]`, given log mean_y z `[lam, prompt]` of `count`
    completions: first the pooled mean for all prompts, then each prompt's own mean, shrunk towards it and
    floored by each share of it."""
    pooled = _log_mean_exp(own, 1)[:, None]
    shrunk = np.logaddexp(own + np.log(count), pooled + np.log(SHRINKAGE)) - np.log(count + SHRINKAGE)
    alike = np.broadcast_to(pooled, own.shape)
    floored = [np.maximum(shrunk, pooled + np.log(share)) for share in SHARES]
    return np.stack([alike, *floored])


def _bound_of(
    own: Doubles, lam: Doubles, log_c: Doubles, radius: float, n: int, log_inverse_delta: float
) -> Doubles:
    """-lam (mean_x log c_x + log u + radius) for own = log mean_y z of each prompt `[..., X]`, as if from n
    draws."""
    least = log_c.min(axis=-1, keepdims=True)
    v = np.exp(own + least - log_c).mean(axis=-1)  # each in [0, 1]
    log_u = np.log(binomial_upper(v, n, log_inverse_delta)) - least[..., 0]
    bound: Doubles = -lam * (log_c.mean(axis=-1) + log_u + radius)
    return bound


@dataclass(frozen=True)
class Point:
    """One measured policy on the certificate's plane."""

    kl: float
    """KL(Q || policy), nats per completion"""
    kl_se: float
    reward: float
    reward_se: float


def violates(
    point: Point, rewards: ArrayLike, *, floor: float, confidence: float = 0.95, z: float = 1.96
) -> bool:
    """Whether a policy lies below what was certified at its own KL: the upper limit of its reward is below
    the bound at the upper limit of its KL."""
    farthest = max(0.0, point.kl + z * point.kl_se)
    bound = reward_lower_bound(rewards, farthest, floor=floor, confidence=confidence)
    return point.reward + z * point.reward_se < bound
