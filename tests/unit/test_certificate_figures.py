"""The certificate's bound and its plug-in's interval, by closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import xlogy

from frpo.certificate import (
    bootstrap_curve,
    curve_of,
    reward_lower_bound,
    reward_lower_bounds,
    tilt_to,
    worst_case_reward,
)


def plan_slowly(z: list[list[float]], prior: float, planned: int, goal: float) -> tuple[list[float], float]:
    """The stakes for draws like z, a list of draws for each prompt, and the upper limit of mean_x log mu_x
    that they would give."""
    prompts, draws = len(z), len(z[0])
    pooled = sum(map(sum, z)) / (prompts * draws)
    means = [(sum(row) + prior * pooled) / (draws + prior) for row in z]
    judged = [(1 / prompts, 1.0, mean) for mean in means]  # weight, draw, by which mean: one at the floor
    for row in z:
        judged += [(1.0, one, (sum(row) - one + prior * pooled) / (draws - 1 + prior)) for one in row]
    total = prompts * draws + 1
    variance = sum(weight * (one / mean - 1) ** 2 for weight, one, mean in judged) / total
    bet = math.sqrt(2 * goal / (planned * variance))
    share = bet / (1 + bet)

    def stake(mean: float) -> float:
        return min(0.75, share / mean)

    growth = sum(weight * math.log(1 - stake(mean) * one) for weight, one, mean in judged) / total
    log_stake = sum(weight * math.log(stake(mean)) for weight, _, mean in judged) / total
    return [stake(mean) for mean in means], math.log(1 - math.exp(growth - goal / planned)) - log_stake


def choose_slowly(
    seen: np.ndarray, radius: float, planned: int, goal: float
) -> tuple[float, float, list[float]]:
    """The best expected bound, its temperature and its stakes."""
    plans = []
    for prior in (2, 1e6):
        for lam in seen.max() * np.geomspace(0.01, 1e3, 61):
            stakes, log_mean = plan_slowly(np.exp(-seen / lam).tolist(), prior, planned, goal)
            plans.append((-lam * (log_mean + radius), lam, stakes))
    return max(plans, key=lambda plan: plan[0])


def bound_slowly(above: np.ndarray, radius: float, delta: float) -> float:
    """Draw by draw what `reward_lower_bound` says of rewards above a floor of 0, some of them above it from
    the start on."""
    prompts, completions = above.shape
    goal = math.log(1 / delta)
    seen = max(1, completions // 16)
    planned = prompts * (completions - seen)
    rounds = []
    while seen < completions:
        expected, lam, stakes = choose_slowly(above[:, :seen], radius, planned, goal)
        for column in above[:, seen : 2 * seen].T:
            if expected > 0:
                rounds.append((lam, stakes, np.exp(-column / lam)))
        seen *= 2

    def excess(b: float) -> float:
        capital, largest = 1.0, 1.0
        for lam, stakes, z in rounds:
            t = math.exp(np.log(stakes).mean() - radius - b / lam)
            capital *= math.prod((1 - stake * one) / (1 - t) for stake, one in zip(stakes, z, strict=True))
            largest = max(largest, capital)
        return largest - 1 / delta

    return float(brentq(excess, 0, above.max(), xtol=1e-13)) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("completions", [7, 16, 33])
@pytest.mark.parametrize(("radius", "delta"), [(0.02, 0.05), (0.2, 0.3)])
def test_the_bound_is_what_slow_betting_wins(completions: int, radius: float, delta: float) -> None:
    rewards = 2 * sample(seed=completions, prompts=5, completions=completions)
    failing_late = np.where(np.arange(completions) < 0.7 * completions, rewards, 0.0)
    for drawn in (rewards, np.ceil(2 * rewards) / 2, failing_late):  # the second: of 4 values
        bound = reward_lower_bound(drawn, radius, floor=0.0, confidence=1 - delta)
        assert bound == pytest.approx(bound_slowly(drawn, radius, delta), abs=1e-9)
    assert reward_lower_bound(rewards, radius, floor=0.0, confidence=1 - delta) > 0


@pytest.mark.parametrize(("radius", "confidence"), [(0.05, 0.95), (0.3, 0.95), (0.3, 0.8)])
@pytest.mark.parametrize(("prompts", "completions"), [(20, 16), (7, 9), (1, 200)])
def test_of_equal_rewards_the_bound_is_nearly_that_of_the_best_bet(
    radius: float, confidence: float, prompts: int, completions: int
) -> None:
    """All rewards s above the floor: z = exp(-s / lam). n draws of it at one stake reach 1 / delta where
    n log((1 - stake z) / (1 - t)) = log(1 / delta); no other bet on n draws does better than the best."""
    n = prompts * completions

    def loss(at: np.ndarray) -> float:
        lam, stake = np.exp(at[0]), 1 / (1 + np.exp(at[1]))
        t = 1 - (1 - stake * np.exp(-1 / lam)) * (1 - confidence) ** (1 / n)
        return float(lam * (np.log(t / stake) + radius))

    best = -min(minimize(loss, start, method="Nelder-Mead").fun for start in ([-1, 0], [0, 1], [-1, 4]))
    bound = reward_lower_bound(np.full((prompts, completions), 2.5), radius, floor=0.5, confidence=confidence)
    assert 0.85 * best < (bound - 0.5) / 2 < best


def test_what_was_won_is_kept_and_no_bet_is_placed_without_hope() -> None:
    good, bad = np.ones((20, 32)), np.zeros((20, 32))
    early = reward_lower_bound(np.hstack([good, bad]), 0.05, floor=0.0)
    assert 0.7 < early < reward_lower_bound(np.hstack([good, good]), 0.05, floor=0.0)
    with np.errstate(all="raise", under="ignore"):
        assert reward_lower_bound(np.hstack([bad, good]), 0.05, floor=0.0) == 0.0
        # the 8 that choose the first bet all fail, and 4 of the 8 that it would be on
        late = np.hstack([np.zeros((20, 12)), np.ones((20, 116))])
        assert reward_lower_bound(late, 0.05, floor=0.0) > 0.3


def test_two_completions_are_enough() -> None:
    assert 0.5 < reward_lower_bound(np.ones((200, 2)), 0.01, floor=0.0) < 1


def test_a_bet_is_chosen_before_its_draws() -> None:
    """The first of 16 chooses for the second, these two for the next two, and so on: inside such a block the
    order moves the capital alone, which is largest at the end here."""
    rewards = 0.5 + 0.5 * sample(completions=16)
    plain = reward_lower_bound(rewards, 0.1, floor=0.0)
    inside = rewards[:, [0, 1, 3, 2, 6, 7, 4, 5, *range(8, 16)]]
    across = rewards[:, ::-1]
    assert reward_lower_bound(inside, 0.1, floor=0.0) == pytest.approx(plain, rel=1e-12)
    assert reward_lower_bound(across, 0.1, floor=0.0) != pytest.approx(plain, rel=1e-6)


def sample(seed: int = 0, prompts: int = 12, completions: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((prompts, completions)) ** rng.uniform(0.1, 2, (prompts, 1))


@pytest.mark.parametrize("radius", [0.02, 0.2])
def test_the_bound_moves_and_stretches_with_the_rewards(radius: float) -> None:
    rewards = sample()
    plain = reward_lower_bound(rewards, radius, floor=0.0)
    assert 0 < plain < worst_case_reward(rewards, radius)
    assert reward_lower_bound(rewards + 3, radius, floor=3.0) == pytest.approx(plain + 3)
    assert reward_lower_bound(rewards * 5, radius, floor=0.0) == pytest.approx(plain * 5)
    assert reward_lower_bound(rewards, radius, floor=-0.5) < plain
    order = np.random.default_rng(1).permutation(12)
    assert reward_lower_bound(rewards[order], radius, floor=0.0) == pytest.approx(plain)


def test_a_prompt_of_its_own_level_is_not_bounded_by_the_others() -> None:
    """With prompts at very different rewards a reference per prompt bounds much closer than one for all."""
    level = np.linspace(0.1, 1.0, 40)[:, None]
    rewards = np.tile(level, (1, 400))
    truth = float(level.mean())
    assert truth - 0.02 < reward_lower_bound(rewards, 0.001, floor=0.0) < truth


def test_more_confidence_and_a_farther_radius_promise_less() -> None:
    rewards = sample(prompts=40)
    by_confidence = [
        reward_lower_bound(rewards, 0.1, floor=0.0, confidence=c) for c in (0.5, 0.9, 0.99, 0.9999)
    ]
    assert by_confidence == sorted(set(by_confidence), reverse=True)
    radii = [0.0, 0.05, 0.2, 0.5]
    by_radius = reward_lower_bounds(rewards, radii, floor=0.0).tolist()
    assert by_radius == sorted(set(by_radius), reverse=True)
    assert by_radius == pytest.approx([reward_lower_bound(rewards, rho, floor=0.0) for rho in radii])
    assert reward_lower_bounds(rewards, [], floor=0.0).tolist() == []


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.1, 1.5])
def test_a_confidence_is_a_share_between_nothing_and_all(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"confidence: {confidence}; need a share"):
        reward_lower_bound(np.ones((2, 4)), 0.1, floor=0.0, confidence=confidence)


@pytest.mark.parametrize("radius", [float("nan"), float("inf"), -1e-9])
def test_a_radius_is_a_number_of_nats(radius: float) -> None:
    for call in (worst_case_reward, lambda r, rho: reward_lower_bound(r, rho, floor=0.0)):
        with pytest.raises(ValueError, match="radius: "):
            call(np.ones((2, 4)), radius)


def test_empty_rewards_are_refused() -> None:
    for shape in ((0, 4), (4, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match="rewards: shape"):
            tilt_to(np.ones(shape), 1.0)


def test_the_tilted_policy_by_hand() -> None:
    rewards = [[1.0, 0.0], [0.2, 0.6]]
    p = [1 / (1 + np.exp(1 / 0.4)), 1 / (1 + np.exp(-1))]  # of the first completion
    reward, kl = tilt_to(rewards, 0.4)
    assert reward == pytest.approx(np.mean([p[0], 0.2 * p[1] + 0.6 * (1 - p[1])]))
    assert kl == pytest.approx(np.mean([np.log(2) + xlogy(q, q) + xlogy(1 - q, 1 - q) for q in p]))
    assert tilt_to([[0.3, 0.3, 0.3]], 0.1) == (pytest.approx(0.3), pytest.approx(0.0, abs=1e-15))
    assert tilt_to([[0.3, 0.3, 0.3]], 0.1)[1] >= 0
    assert tilt_to([[5.0, 0.0]], 1e-4) == (pytest.approx(0.0, abs=1e-9), pytest.approx(np.log(2)))


def test_the_plug_in_ends_at_the_least_rewards_and_no_sooner() -> None:
    rewards = np.array([[0.0, 1.0, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]])
    enough = np.mean([np.log(4), np.log(2)])
    assert worst_case_reward(rewards, enough) == 0.25
    assert worst_case_reward(rewards, enough + 5) == 0.25
    assert 0.25 < worst_case_reward(rewards, enough - 1e-3) < 0.26
    assert worst_case_reward(rewards, 0) == rewards.mean()
    assert worst_case_reward(rewards, 1e-6) == pytest.approx(rewards.mean(), abs=1e-3)
    assert worst_case_reward([[0.4, 0.4]], 1.0) == 0.4


def test_a_resampled_mean_has_the_spread_of_prompts_and_of_completions_within_them() -> None:
    """Of X prompts with replacement, and k completions of each drawn again, the variance is
    var(means) / X + (2 - 1 / X) mean(var) / (k X). A 95 % interval is 2 * 1.96 deviations wide; of 2,000
    draws its ends are known to some 2 % of that."""
    rewards = sample(prompts=20, completions=8)
    prompts, k = rewards.shape
    variance = rewards.mean(1).var() / prompts + (2 - 1 / prompts) * rewards.var(1).mean() / (k * prompts)
    lo, hi = bootstrap_curve(rewards, [0.0], draws=2000)
    assert hi[0] - lo[0] == pytest.approx(2 * 1.96 * variance**0.5, rel=0.09)
    assert (hi[0] + lo[0]) / 2 == pytest.approx(rewards.mean(), abs=0.1 * variance**0.5 * 1.96)
    narrow = bootstrap_curve(rewards, [0.0], draws=2000, confidence=0.6827)
    assert narrow[1][0] - narrow[0][0] == pytest.approx(2 * variance**0.5, rel=0.09)


def test_without_spread_inside_prompts_only_their_choice_varies_and_no_radius_matters() -> None:
    level = np.random.default_rng(3).random((30, 1))
    lo, hi = bootstrap_curve(np.tile(level, (1, 4)), [0.0, 0.1, 2.0], draws=2000)
    assert hi[0] - lo[0] == pytest.approx(2 * 1.96 * level.std() / 30**0.5, rel=0.09)
    np.testing.assert_allclose(lo, lo[0], atol=5e-3)  # the grid begins at 2e-3 of the range
    np.testing.assert_allclose(hi, hi[0], atol=5e-3)


def test_the_interval_of_many_alike_prompts_closes_in_on_the_plug_in_of_each() -> None:
    """Completions are many and alike in every prompt, so that resampling moves little: what is left is the
    grid's error, a thousandth of the range."""
    rewards = np.tile(np.repeat([0.0, 0.4, 1.0], [100, 200, 500]), (8, 1))
    for radius in (0.05, 0.5, 1.0):
        lo, hi = bootstrap_curve(rewards, [radius], draws=40)
        exact = worst_case_reward(rewards, radius)
        assert lo[0] < exact < hi[0] + 2e-3
        assert hi[0] - lo[0] < 0.12
        assert (lo[0] + hi[0]) / 2 == pytest.approx(exact, abs=0.02)


def test_temperatures_go_by_the_spread_inside_prompts_not_between_them() -> None:
    """The median draw takes both prompts as often: it is the plug-in, though their levels are 1,000 apart."""
    rewards = np.repeat([0.0, 0.4, 1.0], [100, 200, 500]) + np.array([[0.0], [1000.0]])
    lo, hi = bootstrap_curve(rewards, [0.5], draws=100, confidence=0.02)
    assert (lo[0] + hi[0]) / 2 == pytest.approx(worst_case_reward(rewards, 0.5), abs=0.05)


def test_a_seed_draws_the_same_resamples() -> None:
    rewards = sample()
    first, again, other = (bootstrap_curve(rewards, [0.1], draws=50, seed=s) for s in (1, 1, 2))
    assert first[0] == again[0] != other[0]
    assert first[1] == again[1] != other[1]


def test_a_curve_is_of_its_grid_seed_and_confidence() -> None:
    rewards = sample()
    radii = [0.0, 0.1, 0.4]
    made = curve_of(rewards, radii, floor=-0.25, confidence=0.9, draws=50, seed=4)
    lo, hi = bootstrap_curve(rewards, radii, confidence=0.9, draws=50, seed=4)
    assert made.radii.tolist() == radii
    assert (made.lo.tolist(), made.hi.tolist()) == (lo.tolist(), hi.tolist())
    assert made.plug_in.tolist() == [worst_case_reward(rewards, rho) for rho in radii]
    each = 1 - 0.1 / 3  # Bonferroni: three at once
    assert made.certified == pytest.approx(
        [reward_lower_bound(rewards, rho, floor=-0.25, confidence=each) for rho in radii]
    )
    plain, given = (
        curve_of(rewards, [0.1], floor=0.0),
        curve_of(rewards, [0.1], floor=0.0, confidence=0.95, draws=1000, seed=0),
    )
    assert (plain.certified, plain.lo) == (given.certified, given.lo)
