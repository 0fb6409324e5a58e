"""The objective where only one number is right: small groups, far rewards, denominators, masks, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from frpo.objective import (
    Denominators,
    Groups,
    Grpo,
    Rloo,
    Surrogate,
    TokenTerms,
    lam_of_radius,
    non_monotone_share,
    policy_loss,
    tilted_weights,
)
from tests.support.builders import weigh

SURROGATE = Surrogate(
    ratio="token",
    clip_low=0.2,
    clip_high=0.3,
    importance="token_truncate",
    importance_cap=2.0,
    aggregation="sum",
)


def rewards(groups: int = 5, k: int = 8) -> Tensor:
    return torch.rand(groups, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_each_group_is_divided_by_its_own_deviation() -> None:
    r = torch.tensor([[0.0, 1.0], [0.2, 0.8], [0.0, 2e-6]], dtype=torch.float64)
    spread = torch.tensor([0.5**0.5, 0.18**0.5, 2e-12**0.5], dtype=torch.float64)  # of n - 1 = 1
    expected = (r - r.mean(1, keepdim=True)) / (spread + 1e-6)[:, None]
    torch.testing.assert_close(
        Grpo(normalize_std=True).advantages(Groups.of(r)), expected, rtol=1e-9, atol=1e-12
    )


def test_of_two_completions_each_is_compared_with_the_other() -> None:
    r = torch.tensor([[0.0, 1.0], [0.7, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(Rloo().advantages(Groups.of(r)), r - r.flip(1))


def test_rewards_far_from_zero_are_tilted_by_the_same_digits() -> None:
    """Differences are taken before they are divided by lam: 2^20 / 7e-4 would leave seven digits of them."""
    step = 2.0**-10
    r = torch.tensor(
        [[0.0, step, 3 * step], [2.0**20, 2.0**20 + step, 2.0**20 + 3 * step]], dtype=torch.float64
    )
    for jackknife in (False, True):
        near, far = tilted_weights(Groups.of(r), 7e-4, jackknife=jackknife)
        assert torch.equal(near, far)


def test_where_no_group_has_two_rewards_lam_stays_at_the_floor() -> None:
    mask = torch.tensor([[True, False, False], [False, False, False]])
    assert lam_of_radius(Groups.of(rewards(2, 3), mask), 0.1, floor=0.05) == 0.05


@pytest.mark.parametrize("scale", [1e-3, 1e6, 1e12])
def test_lam_of_a_radius_scales_with_the_rewards(scale: float) -> None:
    plain = lam_of_radius(Groups.of(rewards()), 0.2, floor=1e-6)
    assert lam_of_radius(Groups.of(scale * rewards()), 0.2, floor=1e-6) == pytest.approx(scale * plain)


@pytest.mark.parametrize(
    ("values", "given", "mask", "share"),
    [
        ([0.0, 1.0], [1.0, -1.0], [True, True], 1.0),
        ([0.0, 1.0], [-1.0, 1.0], [True, True], 0.0),
        ([0.0, 1.0], [0.0, 0.0], [True, True], 0.0),  # as much is not less
        ([0.5, 0.5], [0.0, 1.0], [True, True], 0.0),  # nor is as high higher
        ([-1.0, 0.0, -0.5], [-0.25, 0.0, 0.25], [True, False, True], 0.0),  # a masked 0 is no reward
    ],
)
def test_a_group_is_not_monotone_where_a_higher_reward_has_a_lower_advantage(
    values: list[float], given: list[float], mask: list[bool], share: float
) -> None:
    groups = Groups.of(torch.tensor([values]), torch.tensor([mask]))
    assert non_monotone_share(groups, torch.tensor([given])) == share


def test_without_a_group_none_is_out_of_order() -> None:
    nothing = torch.zeros(0, 3)
    assert non_monotone_share(Groups.of(nothing), nothing) == 0.0


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens() -> None:
    ratios = torch.tensor([[1.1, 9.0, 9.0], [1.2, 0.9, 0.95]], dtype=torch.float64)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    zero = torch.zeros(2, 3, dtype=torch.float64)
    surrogate = replace(SURROGATE, ratio="sequence", aggregation="token")
    terms = policy_loss(
        TokenTerms(ratios.log(), zero, zero, None, mask),
        weigh(torch.tensor([2.0, -1.0], dtype=torch.float64)),
        surrogate,
        Denominators(num_completions=2, num_tokens=4, max_tokens=3),
    )
    mean_ratio = (1.2 * 0.9 * 0.95) ** (1 / 3)
    assert terms.loss.item() == pytest.approx(-(2 * 1.1 - 3 * mean_ratio) / 4)


@pytest.mark.parametrize(("aggregation", "divided_by"), [("completion", 2), ("token", 4), ("sum", 2 * 3)])
def test_a_loss_is_divided_by_the_denominator_of_its_aggregation(aggregation: Any, divided_by: int) -> None:
    zero = torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    terms = policy_loss(
        TokenTerms(zero, zero, zero, zero - 0.5, mask),
        weigh(torch.tensor([2.0, -1.0], dtype=torch.float64)),
        replace(SURROGATE, aggregation=aggregation),
        Denominators(num_completions=2, num_tokens=4, max_tokens=3),
    )
    k3 = math.exp(-0.5) + 0.5 - 1
    first, second = -2 + 0.1 * k3, 1 + 0.1 * k3  # of each token
    summed = first + second if aggregation == "completion" else first + 3 * second
    assert terms.loss.item() == pytest.approx(summed / divided_by)
    assert terms.penalty_sum.item() == pytest.approx(4 * k3)


def test_the_loss_has_the_type_of_the_log_probs() -> None:
    zero = torch.zeros(1, 2)
    terms = policy_loss(
        TokenTerms(zero, zero, zero, None, torch.ones(1, 2, dtype=torch.bool)),
        weigh(torch.ones(1, dtype=torch.float64)),
        SURROGATE,
        Denominators(num_completions=1, num_tokens=2, max_tokens=2),
    )
    assert terms.loss.dtype == torch.float32
