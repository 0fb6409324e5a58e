"""The certificate where the truth is known: small policies enumerated exactly, rare failures among them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, minimize, minimize_scalar

from frpo.certificate import (
    bootstrap_curve,
    curve_of,
    reward_lower_bound,
    reward_lower_bounds,
    tilt_to,
    worst_case_reward,
)

VALUES = np.array([0.0, 0.5, 1.0])


def true_worst_case(probabilities: np.ndarray, radius: float) -> float:
    """R of policies that give the rewards VALUES with `probabilities` [X, 3], by maximising the dual."""

    def negative(log_lam: float) -> float:
        lam = float(np.exp(log_lam))
        return lam * float(np.log(probabilities @ np.exp(-VALUES / lam)).mean()) + lam * radius

    minima = [
        minimize_scalar(negative, bounds=b, method="bounded", options={"xatol": 1e-10})
        for b in ((-5, 0), (0, 5), (5, 12))
    ]
    return max(0.0, -min(f.fun for f in minima))  # lam -> 0 gives the least reward


def draw(rng: np.random.Generator, probabilities: np.ndarray, count: int) -> np.ndarray:
    u = rng.random((len(probabilities), count, 1))
    return VALUES[(u > np.cumsum(probabilities, axis=1)[:, None, :-1]).sum(axis=2)]


POLICIES = {
    "mixed": np.tile([0.3, 0.1, 0.6], (12, 1)),
    "spread": np.stack([[p, 0.1 * (1 - p), 0.9 * (1 - p)] for p in np.linspace(0.001, 0.6, 12)]),
    "rare": np.tile([0.001, 0.0, 0.999], (50, 1)),
}


@pytest.mark.parametrize("failing", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.5])
def test_two_rewards_are_a_bernoulli_tilted_to_the_radius(failing: float, radius: float) -> None:
    k = 1000
    rewards = np.ones((3, k))
    rewards[:, : round(failing * k)] = 0
    kl = lambda q: q * np.log(q / failing) + (1 - q) * np.log((1 - q) / (1 - failing))  # noqa: E731
    q = (
        1.0
        if radius >= -np.log(failing)
        else brentq(lambda q: kl(q) - radius, failing, 1 - 1e-15, xtol=1e-14)
    )
    assert worst_case_reward(rewards, radius) == pytest.approx(1 - q, abs=1e-6)


def test_several_prompts_share_one_budget() -> None:
    rng = np.random.default_rng(3)
    rewards = rng.random((3, 4)) * [[1.0], [0.2], [2.0]]
    size = rewards.shape[1]

    def reward(w: np.ndarray) -> float:
        q = np.exp(w.reshape(3, 4))
        return float((q / q.sum(1, keepdims=True) * rewards).sum(1).mean())

    def slack(w: np.ndarray) -> float:
        logq = w.reshape(3, 4) - np.log(np.exp(w.reshape(3, 4)).sum(1, keepdims=True))
        return 0.4 - float((np.log(size) + (np.exp(logq) * logq).sum(1)).mean())

    optimum = minimize(
        reward,
        -rewards.ravel(),
        constraints={"type": "ineq", "fun": slack},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    assert optimum.success
    assert worst_case_reward(rewards, 0.4) == pytest.approx(optimum.fun, abs=1e-6)


matrices = arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-5, 5, width=32)
)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(matrices, st.floats(0.001, 3), st.floats(0.001, 3))
def test_the_curve_is_monotone_convex_and_between_least_and_mean(
    rewards: np.ndarray, first: float, second: float
) -> None:
    a, b = sorted((first, second))
    low, middle, high = (worst_case_reward(rewards, x) for x in (a, (a + b) / 2, b))
    tolerance = 1e-7
    assert worst_case_reward(rewards, 0) == pytest.approx(rewards.mean(), abs=1e-12)
    assert (
        rewards.min(axis=1).mean() - tolerance
        <= high
        <= middle + tolerance
        <= low + 2 * tolerance
        <= rewards.mean() + 3 * tolerance
    )
    assert middle <= (low + high) / 2 + tolerance
    assert worst_case_reward(rewards + 3, a) == pytest.approx(low + 3, abs=1e-6)
    assert worst_case_reward(rewards * 2, a) == pytest.approx(low * 2, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(matrices, st.floats(0.05, 20))
def test_no_duality_gap(rewards: np.ndarray, lam: float) -> None:
    """The tilted policy at lam is the minimiser at its own radius."""
    reward, radius = tilt_to(rewards, lam)
    if radius > 1e-6:
        assert worst_case_reward(rewards, radius) == pytest.approx(reward, abs=1e-5)


def test_the_plug_in_promises_too_much_where_failures_are_rare_and_the_bound_does_not() -> None:
    truth = true_worst_case(POLICIES["rare"], 1.5)
    assert truth == pytest.approx(0.694, abs=0.001)
    rng = np.random.default_rng(0)
    for count, expected in ((16, 0.97), (64, 0.93), (256, 0.78)):
        samples = [draw(rng, POLICIES["rare"], count) for _ in range(30)]
        assert np.mean([worst_case_reward(s, 1.5) for s in samples]) == pytest.approx(expected, abs=0.035)
        bounds = [reward_lower_bound(s, 1.5, floor=0.0) for s in samples]
        assert max(bounds) < truth
    assert np.mean(bounds) > truth - 0.04  # what it costs at N = 256


@pytest.mark.long
@pytest.mark.parametrize("name", POLICIES)
def test_the_bound_holds_at_least_as_often_as_it_says(name: str) -> None:
    """A bound that holds with exactly 95 % is seen below this limit once in 1,000 times."""
    radii = (0.1, 1.5)
    rng = np.random.default_rng(1)
    truth = np.array([true_worst_case(POLICIES[name], radius) for radius in radii])
    bounds = [reward_lower_bounds(draw(rng, POLICIES[name], 16), radii, floor=0.0) for _ in range(1000)]
    held = (np.array(bounds) <= truth + 1e-9).mean(axis=0)
    assert held.min() >= 0.95 - 3.1 * (0.95 * 0.05 / 1000) ** 0.5


@pytest.mark.parametrize(("prompts", "completions"), [(1, 8), (2, 4)])
@pytest.mark.parametrize(("confidence", "radius"), [(0.7, 0.05), (0.5, 0.02)])
def test_no_policy_is_promised_too_much_more_often_than_delta(
    prompts: int, completions: int, confidence: float, radius: float
) -> None:
    """All 256 samples of 0 and 1, each with its probability under 7 or 49 policies, of prompts unlike each
    other too: no simulation, no tolerance."""
    size = (2 ** (prompts * completions), prompts, completions)
    samples = np.array(list(itertools.product([0.0, 1.0], repeat=size[1] * size[2]))).reshape(size)
    bounds = np.array([reward_lower_bound(s, radius, floor=0.0, confidence=confidence) for s in samples])
    too_high = []
    for failing in itertools.product([0.01, 0.03, 0.1, 0.2, 0.3, 0.45, 0.6], repeat=prompts):
        p = np.array(failing)[:, None]
        truth = true_worst_case(np.hstack([p, 0 * p, 1 - p]), radius)
        probability = np.where(samples == 0, p, 1 - p).prod(axis=(1, 2))
        too_high.append(probability[bounds > truth].sum())
    assert max(too_high) <= 1 - confidence
    assert max(too_high) > 0.2 * (1 - confidence)  # and it does happen


@pytest.mark.long
def test_what_a_promise_costs_at_256_completions() -> None:
    rng = np.random.default_rng(7)
    for policy in POLICIES.values():
        bounds = [reward_lower_bounds(draw(rng, policy, 256), [0.1, 0.5], floor=0.0) for _ in range(12)]
        price = [true_worst_case(policy, radius) for radius in (0.1, 0.5)] - np.mean(bounds, axis=0)
        assert price[0] < 0.03
        assert price[1] < 0.05


def test_the_bound_gets_tighter_with_draws_and_looser_with_confidence() -> None:
    rng = np.random.default_rng(2)
    truth = true_worst_case(POLICIES["mixed"], 0.1)
    bounds = []
    for count in (8, 64, 512):
        samples = [draw(rng, POLICIES["mixed"], count) for _ in range(10)]
        bounds.append(np.mean([reward_lower_bound(drawn, 0.1, floor=0.0) for drawn in samples]))
    assert bounds[0] < bounds[1] < bounds[2] < truth
    assert truth - bounds[2] < 0.02
    sample = draw(rng, POLICIES["mixed"], 64)
    assert reward_lower_bound(sample, 0.1, floor=0.0, confidence=0.99) < reward_lower_bound(
        sample, 0.1, floor=0.0, confidence=0.8
    )


def test_at_a_far_radius_nothing_is_promised() -> None:
    assert reward_lower_bound(np.ones((4, 4)), 8.0, floor=-1.0) == -1.0
    assert reward_lower_bound(np.zeros((4, 4)), 0.1, floor=0.0) == 0.0


def test_bootstrap_covers_the_plug_in_and_shrinks_with_prompts() -> None:
    rng = np.random.default_rng(5)
    radii = np.array([0.0, 0.2, 1.0])
    widths = []
    for prompts in (10, 160):
        rewards = rng.random((prompts, 32))
        lo, hi = bootstrap_curve(rewards, radii, draws=300)
        plug_in = [worst_case_reward(rewards, x) for x in radii]
        assert np.all(lo < plug_in)
        assert np.all(hi + 0.02 > plug_in)
        widths.append(hi - lo)
    assert np.all(widths[1] < widths[0] / 2)


def test_a_curve_promises_all_its_radii_at_once() -> None:
    rewards = draw(np.random.default_rng(6), POLICIES["mixed"], 64)
    promised = curve_of(rewards, [0.1, 0.5], floor=0.0, draws=50)
    for i, radius in enumerate((0.1, 0.5)):
        assert promised.certified[i] == reward_lower_bound(rewards, radius, floor=0.0, confidence=0.975)
        assert promised.certified[i] < promised.plug_in[i] == worst_case_reward(rewards, radius)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: worst_case_reward(np.zeros(3), 0.1), r"shape \(3,\); need \[prompts, completions\]"),
        (lambda: worst_case_reward(np.full((2, 2), np.nan), 0.1), "a failed reward counts as the floor"),
        (lambda: worst_case_reward(np.zeros((2, 2)), -0.1), "radius: -0.1"),
        (lambda: reward_lower_bound(np.zeros((2, 1)), 0.1, floor=0.0), "at least 2"),
        (lambda: reward_lower_bound(np.zeros((2, 2)), 0.1, floor=0.5), "floor: 0.5 is above the reward 0.0"),
        (lambda: tilt_to(np.zeros((2, 2)), 0.0), "lam: 0.0"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
