"""The certificate's bound and its plug-in's interval, by closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import xlogy

from frpo.certificate import (
    Point,
    binomial_upper,
    bootstrap_curve,
    curve_of,
    reward_lower_bound,
    tilt_to,
    violates,
    worst_case_reward,
)


def upper(mean: float, n: int, confidence: float) -> float:
    """Where n kl(mean, q) = log 1 / (1 - confidence), or 1 where no double below it is."""

    def excess(q: float) -> float:
        kl = xlogy(mean, mean / q) + xlogy(1 - mean, (1 - mean) / (1 - q))
        return n * float(kl) + np.log(1 - confidence)

    return float(brentq(excess, mean, 1 - 1e-15, xtol=1e-15)) if excess(1 - 1e-15) > 0 else 1.0


@pytest.mark.parametrize(("radius", "confidence"), [(0.05, 0.95), (0.3, 0.95), (0.3, 0.8)])
@pytest.mark.parametrize(("prompts", "completions"), [(20, 16), (7, 9)])
def test_of_equal_rewards_the_bound_is_that_of_one_bernoulli(
    radius: float, confidence: float, prompts: int, completions: int
) -> None:
    """All rewards s above the floor: z = exp(-s / lam) everywhere, so R >= -lam (log z_up + radius) with the
    n draws of half B. The best of 61 temperatures is within a few per cent of the best of all."""
    n = prompts * (completions - completions // 2)
    scale = np.geomspace(0.01, 1e3, 2000)
    best = max(-lam * (np.log(upper(np.exp(-1 / lam), n, confidence)) + radius) for lam in scale[::40])
    exact = max(
        -lam * (np.log(upper(np.exp(-1 / lam), n, confidence)) + radius)
        for lam in np.geomspace(0.01, 1e3, 61)
    )
    bound = reward_lower_bound(np.full((prompts, completions), 2.5), radius, floor=0.5, confidence=confidence)
    assert bound == pytest.approx(0.5 + 2 * exact, rel=1e-9)
    assert bound == pytest.approx(0.5 + 2 * best, rel=0.05)


def test_an_upper_limit_is_of_shares_and_warns_of_nothing() -> None:
    means = np.array([-0.1, 0.0, 0.5, 1.0, 1.2])
    with np.errstate(divide="raise", invalid="raise"):
        limits = binomial_upper(means, 20, 3.0)
    assert limits.tolist() == binomial_upper([0.0, 0.0, 0.5, 1.0, 1.0], 20, 3.0).tolist()
    assert limits[1] == pytest.approx(1 - np.exp(-3 / 20))  # (1 - q)^n = delta
    assert limits[3] == 1


def test_half_a_chooses_and_half_b_alone_bounds() -> None:
    good, bad = np.ones((20, 32)), np.zeros((20, 32))
    promised = reward_lower_bound(np.hstack([good, good]), 0.05, floor=0.0)
    assert promised > 0.7
    assert reward_lower_bound(np.hstack([good, bad]), 0.05, floor=0.0) == 0.0
    rng = np.random.default_rng(0)
    mixed = np.where(rng.random((20, 32)) < 0.3, 0.0, 1.0)
    assert 0 < reward_lower_bound(np.hstack([good, mixed]), 0.05, floor=0.0) < 0.5
    assert reward_lower_bound(np.hstack([bad, good]), 0.05, floor=0.0) == 0.0  # a bad choice promises nothing


def test_of_an_odd_number_of_completions_the_larger_half_bounds() -> None:
    failing = np.ones((20, 5))
    failing[:, 2] = 0.0  # of halves 0-1 and 2-4
    late = np.ones((20, 5))
    late[:, 4] = 0.0
    promised = reward_lower_bound(late, 0.01, floor=0.0)
    assert 0 < promised == reward_lower_bound(failing, 0.01, floor=0.0)


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
    shuffled = np.hstack([rewards[:, 15::-1], rewards[:, 31:15:-1]])[order]
    assert reward_lower_bound(shuffled, radius, floor=0.0) == pytest.approx(plain)


def test_a_prompt_of_its_own_level_is_not_bounded_by_the_others() -> None:
    """With prompts at very different rewards a reference per prompt bounds much closer than one for all."""
    level = np.linspace(0.1, 1.0, 40)[:, None]
    rewards = np.tile(level, (1, 400))
    truth = float(level.mean())
    assert truth - 0.06 < reward_lower_bound(rewards, 0.001, floor=0.0) < truth


def test_more_confidence_and_a_farther_radius_promise_less() -> None:
    rewards = sample(prompts=40)
    by_confidence = [
        reward_lower_bound(rewards, 0.1, floor=0.0, confidence=c) for c in (0.5, 0.9, 0.99, 0.9999)
    ]
    assert by_confidence == sorted(set(by_confidence), reverse=True)
    by_radius = [reward_lower_bound(rewards, rho, floor=0.0) for rho in (0.0, 0.05, 0.2, 0.5)]
    assert by_radius == sorted(set(by_radius), reverse=True)


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


def test_a_violation_is_judged_at_the_upper_limits() -> None:
    rewards = sample(prompts=40)

    def bound(radius: float, confidence: float = 0.95) -> float:
        return reward_lower_bound(rewards, radius, floor=0.0, confidence=confidence)

    limit = bound(0.2 + 1.96 * 0.05)
    assert violates(Point(0.2, 0.05, limit - 1e-6, 0.0), rewards, floor=0.0)
    assert not violates(Point(0.2, 0.05, limit + 1e-6, 0.0), rewards, floor=0.0)
    assert not violates(Point(0.2, 0.05, limit - 1.96 * 0.01 + 1e-6, 0.01), rewards, floor=0.0)
    assert violates(Point(0.2, 0.05, limit - 1.96 * 0.01 - 1e-6, 0.01), rewards, floor=0.0)
    near, stricter = bound(0.2 + 0.05), bound(0.2 + 0.05, 0.999)
    assert stricter < near
    assert violates(Point(0.2, 0.05, near - 1e-6, 0.0), rewards, floor=0.0, z=1.0)
    assert not violates(Point(0.2, 0.05, near - 1e-6, 0.0), rewards, floor=0.0, z=1.0, confidence=0.999)
    assert violates(
        Point(-0.2, 0.0, bound(0.0) - 1e-6, 0.0), rewards, floor=0.0
    )  # an estimate below 0 is none
    assert violates(Point(0.2, 0.05, -0.6, 0.0), rewards, floor=-0.5)
