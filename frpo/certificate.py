"""What a policy's reward can fall to inside a KL ball: the plug-in curve, its interval, and the bound that
holds.

Rewards are those of independent completions drawn at temperature 1, `[prompts, completions]`; radii are in
nats per completion. No policy Q with mean over prompts of KL(Q || policy) <= rho averages less than

    R(rho) = max over lam > 0 of  -lam mean_x log E_{y~policy} exp(-r / lam) - lam rho        (3.5 of arXiv
    2602.08813)

`worst_case_reward` puts the sample in place of E: good for plots, too high for a promise (Jensen, and the
maximum), most so where failures are rare. `reward_lower_bounds` hold at every sample size: they are won by
betting on each draw before it is seen. Imports numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]

SHRINKAGE = (2.0, 1e6)
"""Draws that the pooled mean counts for when a prompt's own mean is shrunk towards it: few, or so many that
all prompts are alike."""
LARGEST_STAKE = 0.75
"""What one draw at the floor can cost: this share of the capital (1/2 or 3/4 in arXiv 2010.09686)."""
HEAD = 16
"""One in so many completions of a prompt, at least one, is not bet on: they choose the first bets."""


def _checked_rewards(rewards: ArrayLike) -> Doubles:
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or r.size == 0:
        raise ValueError(f"rewards: shape {r.shape}; need [prompts, completions], not empty")
    if not np.isfinite(r).all():
        raise ValueError("rewards: not finite; a failed reward counts as the floor of the reward here")
    return r


def _checked_radius(radius: float) -> float:
    if not (radius >= 0 and np.isfinite(radius)):
        raise ValueError(f"radius: {radius}; need a number of nats >= 0")
    return radius


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
    r = _checked_rewards(rewards)
    spread = _largest_spread(r)
    if _checked_radius(radius) == 0 or spread == 0:
        return float(r.mean())
    least = r.min(axis=1, keepdims=True)
    if radius >= float(np.log(r.shape[1] / (r == least).sum(axis=1)).mean()):
        return float(least.mean())
    lam = _lam_of_radius(r, radius, spread)
    # -lam mean_x log E exp(-r / lam) - lam rho, with the least reward of each prompt taken out of the log
    dual = least[:, 0].mean() - lam * (np.log(np.exp((least - r) / lam).mean(axis=1)).mean() + radius)
    return float(min(max(dual, least.mean()), r.mean()))


def _lam_of_radius(r: Doubles, radius: float, spread: float) -> float:
    """The temperature whose tilted policy lies `radius` nats away: a bisection, as the KL falls in lam."""
    low = np.log(spread * 1e-9)
    high = np.log(spread * 1e9)
    for _ in range(40):
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
        certified=reward_lower_bounds(r, grid, floor=floor, confidence=each),
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


def reward_lower_bound(rewards: ArrayLike, radius: float, *, floor: float, confidence: float = 0.95) -> float:
    """`reward_lower_bounds` at one radius."""
    return float(reward_lower_bounds(rewards, [radius], floor=floor, confidence=confidence)[0])


def reward_lower_bounds(
    rewards: ArrayLike, radii: ArrayLike, *, floor: float, confidence: float = 0.95
) -> Doubles:
    """Numbers `[M]` that R is not below at `radii` `[M]`: each, not all at once, with probability >=
    `confidence` over the draws, at every sample size.

    rewards `[prompts, completions]`, completions >= 2, independent draws that were not used to choose the
    policy, in an order that does not depend on them, none below `floor`; the statement is about these
    prompts. Never below `floor`; at `floor` nothing can be promised at this radius with so few completions.
    Raises ValueError for a reward below the floor or a single completion.

    Let z = exp(-(r - floor) / lam), in (0, 1], with means mu_x. Before a round, which is one draw of each of
    X prompts, earlier rounds choose lam and stakes s_x in [0, 1). As log(1 - exp(a)) is concave in a,

        E prod_x (1 - s_x z_x) = prod_x (1 - s_x mu_x) <= (1 - t)^X,  log t = mean_x log s_x + mean_x log mu_x

    Were R(radius) <= floor + b, then -lam (mean_x log mu_x + radius) <= b for every lam, so that log t >=
    mean_x log s_x - radius - b / lam =: log t(b). The product over rounds of prod_x (1 - s_x z_x) / (1 -
    t(b))^X is then a capital that starts at 1 and is not expected to grow: by Ville's inequality it ever
    reaches 1 / delta with probability <= delta. It falls in b: the largest b at which it did is the bound.

    A bet against the mean of a bounded variable (Waudby-Smith and Ramdas 2023, arXiv 2010.09686), on the
    mean of the logs of many. Prompts need not be alike, and each draw both pays and chooses later bets.
    """
    r = _checked_rewards(rewards)
    rho = np.array([_checked_radius(radius) for radius in np.asarray(radii, dtype=np.float64)])
    if r.shape[1] < 2:
        raise ValueError("rewards: one completion per prompt; the bound needs at least 2, to choose and bet")
    if (r < floor).any():
        raise ValueError(
            f"floor: {floor} is above the reward {r.min()}; give the least value that the reward can take"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}; need a share between 0 and 1")
    above = r - floor
    goal = float(-np.log1p(-confidence))  # log 1 / delta
    bets = _place_bets(above, rho, goal)
    low = np.zeros(len(rho))
    high = np.full(len(rho), above.max())
    for _ in range(40):
        middle = (low + high) / 2
        reached = bets.log_capital(middle) >= goal
        low = np.where(reached, middle, low)
        high = np.where(reached, high, middle)
    return floor + low


@dataclass(frozen=True)
class _Bets:
    """K bets for each of M radii, held over T rounds."""

    lam: Doubles
    """[M, K]"""
    level: Doubles
    """log t(0) [M, K]; -inf without a stake"""
    won: Doubles
    """log prod (1 - s_x z_x) over the draws up to each round [M, T]"""
    draws: Doubles
    """How many of these were bet on by each bet [K, T]"""

    def log_capital(self, b: Doubles) -> Doubles:
        """Log of the largest capital of any round `[M]`, were R(radius) <= floor + b `[M]`."""
        log_fair = np.log1p(-np.exp(self.level - b[:, None] / self.lam))
        largest: Doubles = (self.won - log_fair @ self.draws).max(axis=1)
        return largest


def _place_bets(above: Doubles, radii: Doubles, goal: float) -> _Bets:
    """On rewards above the floor `[prompts, completions]`: what was seen chooses the bet on as many again."""
    prompts, completions = above.shape
    head = max(1, completions // HEAD)
    num_seen = [head]
    while 2 * num_seen[-1] < completions:
        num_seen.append(2 * num_seen[-1])
    lams: list[Doubles] = []
    levels: list[Doubles] = []
    won: list[Doubles] = []
    for seen in num_seen:
        lam, stakes = _choose_bet(above[:, :seen], radii, prompts * (completions - head), goal)
        z = np.exp(-above[:, seen : 2 * seen] / lam[:, None, None])
        won.append(np.log1p(-stakes[..., None] * z).sum(axis=1))
        with np.errstate(divide="ignore"):
            levels.append(np.log(stakes).mean(axis=1) - radii)
        lams.append(lam)
    begun = np.array(num_seen)[:, None]
    rounds = np.clip(np.arange(head + 1, completions + 1) - begun, 0, begun)
    return _Bets(
        lam=np.stack(lams, axis=1),
        level=np.stack(levels, axis=1),
        won=np.hstack(won).cumsum(axis=1),
        draws=prompts * rounds.astype(np.float64),
    )


def _choose_bet(seen: Doubles, radii: Doubles, planned: int, goal: float) -> tuple[Doubles, Doubles]:
    """lam `[M]` and stakes `[M, prompts]` by which `planned` draws like those seen would promise most; no
    stakes where that is nothing."""
    lams = (float(seen.max()) or 1.0) * np.geomspace(0.01, 1e3, 61)
    values, counts = _count_values(seen)
    z = np.exp(-values / lams[:, None, None])
    plans = [_plan_stakes(z, counts, prior, planned, goal) for prior in SHRINKAGE]
    stakes = np.concatenate([plan[0] for plan in plans])
    log_means = np.concatenate([plan[1] for plan in plans])
    scale = np.tile(lams, len(plans))
    expected = -scale * (log_means + radii[:, None])  # [M, plan and lam]
    best = expected.argmax(axis=1)
    promising = expected.max(axis=1) > 0
    return scale[best], np.where(promising[:, None], stakes[best], 0.0)


def _count_values(rewards: Doubles) -> tuple[Doubles, Doubles]:
    """The same draws with fewer numbers where they take few values: values and how often each was drawn
    `[prompts, K]`."""
    values, which = np.unique(rewards, return_inverse=True)
    if len(values) >= rewards.shape[1]:
        return rewards, np.ones_like(rewards)
    counts = (which.reshape(rewards.shape)[..., None] == np.arange(len(values))).sum(axis=1)
    return np.broadcast_to(values, counts.shape), counts.astype(np.float64)


def _plan_stakes(
    z: Doubles, counts: Doubles, prior: float, planned: int, goal: float
) -> tuple[Doubles, Doubles]:
    """Stakes `[lam, prompt]` for draws like z `[lam, prompt, K]`, drawn `counts` `[prompt, K]` times, and the
    upper limit of mean_x log mu_x `[lam]` that `planned` of them would leave.

    s_x is a share of 1 / mean: the prompt's mean, shrunk towards that of all as if `prior` draws had been at
    it. Then 1 - s_x z goes as 1 + b (1 - z / mean), b = share / (1 - share), and n draws of relative variance
    v tell most at b = sqrt(2 goal / (n v)). Each draw is judged by the mean that the others give, and one
    more is counted that fell to the floor.
    """
    prompts = len(counts)
    draws = counts[0].sum()
    total = (counts * z).sum(axis=2, keepdims=True)
    pooled = total.mean(axis=1, keepdims=True) / draws
    mean = (total + prior * pooled) / (draws + prior)
    others = (total - z + prior * pooled) / (draws - 1 + prior)
    judged = np.concatenate([z, np.ones_like(mean)], axis=2)
    by = np.concatenate([np.where(counts > 0, others, mean), mean], axis=2)  # a value not drawn weighs 0
    weights = np.hstack([counts, np.full((prompts, 1), 1 / prompts)]) / (prompts * draws + 1)
    variance = (weights * (judged / by - 1) ** 2).sum(axis=(1, 2))
    share = (1 / (1 + np.sqrt(planned * variance / (2 * goal))))[:, None, None]
    stakes = np.minimum(share / by, LARGEST_STAKE)
    growth = (weights * np.log1p(-stakes * judged)).sum(axis=(1, 2))
    log_stake = (weights * np.log(stakes)).sum(axis=(1, 2))
    return stakes[..., -1], np.log(-np.expm1(growth - goal / planned)) - log_stake
