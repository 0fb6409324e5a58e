"""The objective against independent formulas, limits, invariances and autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frpo.objective import (
    Denominators,
    Estimator,
    Frpo,
    Groups,
    Grpo,
    Rloo,
    Surrogate,
    TokenTerms,
    lam_of_radius,
    measure_tilt,
    non_monotone_share,
    policy_loss,
    reverse_penalty,
    tilted_weights,
)
from tests.support.builders import weigh

LAMS = [1e-3, 0.01, 0.2, 0.5, 2.0, 1e3]


def rewards(groups: int = 5, k: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(groups, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SURROGATE = Surrogate(
    ratio="token",
    clip_low=0.2,
    clip_high=0.3,
    importance="token_truncate",
    importance_cap=2.0,
    aggregation="sum",
)


def advantages(estimator: Estimator, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    return estimator.advantages(Groups.of(rewards, mask))


def log_mean_loss(log_ratio: Tensor, r: Tensor, lam: float, jackknife: bool) -> Tensor:
    """The paper's loss of one group [k], minus its baseline (the mean ratio)."""
    k = len(r)
    z = log_ratio - r / lam

    def log_mean(v: Tensor) -> Tensor:
        return torch.logsumexp(v, 0) - math.log(len(v))

    value = log_mean(z)
    if jackknife:
        leave_one_out = torch.stack([log_mean(torch.cat([z[:i], z[i + 1 :]])) for i in range(k)])
        value = k * value - (k - 1) / k * leave_one_out.sum()
    return value - log_ratio.exp().mean()


@pytest.mark.parametrize("jackknife", [False, True])
@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("k", [2, 3, 8])
def test_closed_form_is_the_gradient_of_the_log_mean_loss(jackknife: bool, lam: float, k: int) -> None:
    r = rewards(4, k)
    closed_form = advantages(Frpo(lam, jackknife, "unit"), r)
    for row, expected in zip(r, closed_form, strict=True):
        log_ratio = torch.zeros(k, dtype=torch.float64, requires_grad=True)
        log_mean_loss(log_ratio, row, lam, jackknife).backward()
        assert log_ratio.grad is not None
        # the loss is descended, so its gradient is -(A_j / s) / k
        torch.testing.assert_close(-k * log_ratio.grad, expected, rtol=1e-9, atol=1e-9)


def test_large_lam_is_dr_grpo_and_with_jackknife_rloo() -> None:
    r = rewards()
    plug_in = advantages(Frpo(1e6, False, "exact"), r)
    jackknife = advantages(Frpo(1e6, True, "exact"), r)
    torch.testing.assert_close(plug_in, r - r.mean(1, keepdim=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(jackknife, advantages(Rloo(), r), rtol=0, atol=1e-5)
    others = (r.sum(1, keepdim=True) - r) / 7
    torch.testing.assert_close(advantages(Rloo(), r), r - others, rtol=0, atol=1e-12)


def test_small_lam_looks_at_the_worst_completion_alone() -> None:
    r = torch.tensor([[0.9, 0.1, 0.8, 1.0]], dtype=torch.float64)
    a = advantages(Frpo(1e-3, False, "unit"), r)
    torch.testing.assert_close(a, torch.tensor([[1.0, -3.0, 1.0, 1.0]], dtype=torch.float64))


def test_jackknife_at_small_lam_is_not_monotone_as_stated() -> None:
    r = torch.tensor([[0.0, 0.3, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0]], dtype=torch.float64)
    a = advantages(Frpo(0.02, True, "unit"), r)
    torch.testing.assert_close(
        a[0, :3],
        torch.tensor([1 - 8 * (8 - 7 / 8 * 7), 1 + 7.0, 1.0], dtype=torch.float64),
        rtol=0,
        atol=2e-2,
    )
    assert a[0, 0] < -13.9
    assert a[0, 1] > 7.9
    assert non_monotone_share(Groups.of(r), a) == 1.0
    assert non_monotone_share(Groups.of(r), advantages(Grpo(normalize_std=True), r)) == 0.0


def test_share_of_non_monotone_groups_matches_the_published_figures() -> None:
    r = rewards(4000, 8, seed=1)
    shares = [
        non_monotone_share(Groups.of(r), advantages(Frpo(lam, True, "unit"), r))
        for lam in (0.05, 0.1, 0.2, 0.5)
    ]
    assert shares == pytest.approx([0.75, 0.44, 0.05, 0.0], abs=0.03)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.sampled_from(LAMS),
    st.booleans(),
    st.sampled_from(["exact", "unit", "code"]),
    st.integers(0, 99),
    st.floats(-5, 5),
)
def test_invariances(k: int, lam: float, jackknife: bool, scale: str, seed: int, shift: float) -> None:
    r = rewards(3, k, seed)
    a = advantages(Frpo(lam, jackknife, scale), r)  # type: ignore[arg-type]
    size = a.abs().max().item() + 1
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a.sum(1) / size, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    moved = advantages(Frpo(lam, jackknife, scale), r + shift)  # type: ignore[arg-type]
    torch.testing.assert_close(moved / size, a / size, rtol=0, atol=1e-9 / min(lam, 1))
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    permuted = advantages(Frpo(lam, jackknife, scale), r[:, order])  # type: ignore[arg-type]
    torch.testing.assert_close(permuted / size, a[:, order] / size, rtol=0, atol=1e-9)
    equal = advantages(Frpo(lam, jackknife, scale), torch.full((2, k), 0.3, dtype=torch.float64))  # type: ignore[arg-type]
    torch.testing.assert_close(equal, torch.zeros(2, k, dtype=torch.float64), rtol=0, atol=1e-9 * max(lam, 1))


@pytest.mark.parametrize("jackknife", [False, True])
def test_a_masked_completion_leaves_its_group(jackknife: bool) -> None:
    r = rewards(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 2] = False
    kept = [0, 1, 3, 4]
    r[:, 2] = float("nan")  # a failed reward never reaches the numbers
    for lam in LAMS:
        a = advantages(Frpo(lam, jackknife, "exact"), r, mask)
        torch.testing.assert_close(a[:, kept], advantages(Frpo(lam, jackknife, "exact"), r[:, kept]))
        assert (a[:, 2] == 0).all()
    torch.testing.assert_close(
        advantages(Grpo(normalize_std=True), r, mask)[:, kept],
        advantages(Grpo(normalize_std=True), r[:, kept]),
    )
    torch.testing.assert_close(advantages(Rloo(), r, mask)[:, kept], advantages(Rloo(), r[:, kept]))


def test_fewer_than_two_rewards_give_zeros() -> None:
    r = rewards(2, 3)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    for a in (
        advantages(Frpo(0.5, True, "code"), r, mask),
        advantages(Grpo(normalize_std=True), r, mask),
        advantages(Rloo(), r, mask),
    ):
        assert (a == 0).all()


def test_scale() -> None:
    r = rewards()
    unit = advantages(Frpo(0.2, True, "unit"), r)
    torch.testing.assert_close(advantages(Frpo(0.2, True, "exact"), r), 0.2 * unit)
    torch.testing.assert_close(advantages(Frpo(0.2, True, "code"), r), unit)
    torch.testing.assert_close(
        advantages(Frpo(4.0, True, "code"), r),
        4 * advantages(Frpo(4.0, True, "unit"), r),
    )


def test_lam_2_on_unit_rewards_stays_within_28_percent_of_rloo() -> None:
    r = rewards(500, 8)
    gap = (advantages(Frpo(2.0, True, "exact"), r) - advantages(Rloo(), r)).abs().amax(1)
    assert (gap <= 0.28 * advantages(Rloo(), r).abs().amax(1)).all()


@pytest.mark.parametrize("estimator", [Frpo(0.01, True, "exact"), Grpo(normalize_std=True), Rloo()])
def test_computed_in_float64_whatever_the_dtype_of_rewards(estimator: Estimator) -> None:
    r = rewards().float()
    a = advantages(estimator, r)
    assert a.dtype == torch.float64
    torch.testing.assert_close(a, advantages(estimator, r.double()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: advantages(Frpo(1.0, True, "exact"), torch.rand(3, 1)), "k >= 2"),
        (lambda: advantages(Frpo(1.0, True, "exact"), torch.rand(4)), "groups, k"),
        (lambda: advantages(Frpo(0.0, True, "exact"), torch.rand(3, 4)), "lam: 0.0"),
        (lambda: advantages(Grpo(normalize_std=False), torch.tensor([[1.0, float("nan")]])), "not finite"),
        (lambda: advantages(Rloo(), torch.rand(2, 3), torch.ones(2, 2, dtype=torch.bool)), "mask: shape"),
    ],
)
def test_errors(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()


def test_weights_sum_to_one() -> None:
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    for lam in LAMS:
        for jackknife in (False, True):
            c = tilted_weights(Groups.of(rewards(2, 6), mask), lam, jackknife=jackknife)
            torch.testing.assert_close(c.sum(1), torch.ones(2, dtype=torch.float64))


# ---- an enumerable policy: one state, 6 actions, exact expectations


def enumerate_step(penalty: str, steps: int = 4000) -> tuple[Tensor, Tensor]:
    """Descend only the penalty by its exact expected update; returns (policy, reference)."""
    reference = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    logits = torch.tensor([0.0, 2.0, -1.0, 0.5, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    return logits, reference


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def penalty_gradient(penalty: str, logits: Tensor, reference: Tensor) -> Tensor:
    """Expected gradient (under the policy) of what the code trains on with zero reward and beta 1."""
    logp = torch.log_softmax(logits, 0)
    p = logp.detach().exp()
    grad = torch.zeros_like(logits)
    if penalty != "reverse":
        surrogate = replace(SURROGATE, penalty=penalty, aggregation="sum")  # type: ignore[arg-type]
        for a in range(len(p)):
            now = logp[a].reshape(1, 1)
            mask = torch.ones(1, 1, dtype=torch.bool)
            terms = policy_loss(
                TokenTerms(now, now.detach(), now.detach(), reference[a].log().reshape(1, 1), mask),
                weigh(torch.zeros(1, dtype=torch.float64), beta=1.0),
                surrogate,
                Denominators(1, 1, 1),
            )
            grad += p[a] * torch.autograd.grad(terms.loss, logits, retain_graph=True)[0]
        return grad
    pairs = torch.cartesian_prod(
        torch.arange(len(p)), torch.arange(len(p))
    )  # groups of two, each with its probability
    d = (p.log() - reference.log())[pairs]
    two = torch.full((len(pairs), 1), 2.0).double()  # k/(k-1) undoes the bias of the group's own mean
    advantage = reverse_penalty(Groups.of(d), two)
    for pair, a in zip(pairs, advantage, strict=True):
        weight = p[pair].prod()
        loss = -(a * logp[pair]).mean()
        grad += weight * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return grad


@pytest.mark.parametrize("penalty", ["k3", "token", "reverse"])
def test_each_penalty_descends_the_kl_that_it_claims(penalty: str) -> None:
    logits, reference = enumerate_step(penalty)
    p = torch.log_softmax(logits, 0).exp()
    forward, backward = (
        torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (kl(reference, p), kl(p, reference))
    )
    gradient = penalty_gradient(penalty, logits, reference)
    claimed, other = (forward, backward) if penalty == "k3" else (backward, forward)
    torch.testing.assert_close(gradient, claimed, rtol=1e-9, atol=1e-12)
    assert (gradient - other).abs().max() > 0.05


# ---- the loss


def loss_inputs(n: int = 12, t: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, t + 1, (n,), generator=g)
    values = {
        name: -torch.rand(n, t, generator=g, dtype=dtype) for name in ("now", "old", "behaviour", "reference")
    }
    values["advantages"] = torch.randn(n, generator=g, dtype=dtype)
    values["mask"] = torch.arange(t)[None] < lengths[:, None]
    return values


@pytest.mark.parametrize("aggregation", ["completion", "token", "sum"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_any_cut_of_a_batch_gives_the_same_gradient(aggregation: str, ratio: str) -> None:
    values = loss_inputs()
    surrogate = replace(SURROGATE, ratio=ratio, aggregation=aggregation)  # type: ignore[arg-type]
    total = Denominators(12, int(values["mask"].sum()), 6)

    def gradient(cuts: list[list[int]]) -> Tensor:
        now = values["now"].clone().requires_grad_()
        for rows in cuts:
            part = {name: value[rows] for name, value in {**values, "now": now}.items()}
            signs = part.pop("advantages")
            policy_loss(TokenTerms(**part), weigh(signs), surrogate, total).loss.backward()
        assert now.grad is not None
        return now.grad

    whole = gradient([list(range(12))])
    assert whole.abs().max() > 0
    for cuts in (
        [[i] for i in range(12)],
        [[0, 5, 7], [1, 2, 3, 4, 6], [8, 9, 10, 11]],
        [list(range(11, 5, -1)), list(range(6))],
    ):
        torch.testing.assert_close(gradient(cuts), whole, rtol=1e-6, atol=1e-12)


def test_ratio_one_is_the_plain_policy_gradient() -> None:
    v = loss_inputs()
    logprobs = v["now"].clone().requires_grad_()
    terms = policy_loss(
        TokenTerms(logprobs, v["now"], v["now"], None, v["mask"]),
        weigh(v["advantages"]),
        replace(SURROGATE, aggregation="sum"),
        Denominators(12, 1, 6),
    )
    terms.loss.backward()
    expected = -(v["advantages"][:, None] * v["mask"]) / (12 * 6)
    torch.testing.assert_close(logprobs.grad, expected)
    assert terms.clipped == 0
    assert terms.penalty_sum == 0


def test_clipping_follows_the_sign_of_the_advantage() -> None:
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5]], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    zero, mask = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)
    terms = policy_loss(
        TokenTerms(logprobs, zero, zero, None, mask),
        weigh(torch.tensor([1.0, -1.0], dtype=torch.float64)),
        replace(SURROGATE, aggregation="token"),
        Denominators(2, 4, 6),
    )
    terms.loss.backward()
    # A > 0 stops above 1.3, A < 0 stops below 0.8; the other two keep their gradient -r A / 4
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([[0.0, -0.125], [0.375, 0.0]], dtype=torch.float64)
    )
    assert terms.loss.item() == pytest.approx(-(1.3 + 0.5 - 1.5 - 0.8) / 4)
    assert terms.clipped == 2


def test_importance_weight_is_truncated_and_carries_no_gradient() -> None:
    one, mask = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    for gap, expected in ((0.5, math.exp(0.5)), (3.0, 2.0), (-1.0, math.exp(-1))):
        logprobs = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        policy_loss(
            TokenTerms(logprobs, 0 * one, -gap * one, None, mask),
            weigh(one[0]),
            replace(SURROGATE, aggregation="token"),
            Denominators(1, 1, 6),
        ).loss.backward()
        torch.testing.assert_close(logprobs.grad, -expected * one)


@pytest.mark.parametrize("rho", [0.01, 0.3, 1.2])
def test_lam_of_radius_reaches_the_radius(rho: float) -> None:
    r = torch.rand(20, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones_like(r, dtype=torch.bool)
    mask[0, 3:] = False
    mask[1, 1:] = False  # a group of one has no tilt and does not count
    lam = lam_of_radius(Groups.of(r, mask), rho, floor=1e-3)
    radius, effective = measure_tilt(Groups.of(r, mask), lam)
    assert len(radius) == 19
    assert float(radius.mean()) == pytest.approx(rho, abs=1e-6)
    p = torch.softmax(-r[5] / lam, 0)
    assert float(radius[4]) == pytest.approx(float((p * (p * 8).log()).sum()), abs=1e-9)
    assert float(effective[4]) == pytest.approx(float(1 / (p * p).sum()), rel=1e-9)


def test_where_a_radius_is_out_of_reach_lam_stays_at_the_floor() -> None:
    ties = torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 3 + [[1.0] * 4])
    most = 0.75 * math.log(4 / 3)
    assert lam_of_radius(Groups.of(ties), most + 0.01, floor=0.02) == 0.02
    assert float(measure_tilt(Groups.of(ties), 0.02)[0].mean()) == pytest.approx(most, abs=1e-6)
    assert lam_of_radius(Groups.of(ties), most / 2, floor=0.02) > 0.1
    assert lam_of_radius(Groups.of(torch.ones(3, 4)), 0.1, floor=0.02) == 0.02
