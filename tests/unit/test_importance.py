"""Importance weights against a formula of their own, and what they are for: an average over what another
policy drew is one over ours."""

from __future__ import annotations

import math

import pytest
import torch

from frpo.objective import (
    Denominators,
    Importance,
    Surrogate,
    TokenTerms,
    importance_weights,
    policy_loss,
)
from tests.support.builders import weigh as weighted

KINDS: list[Importance] = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def terms(now: torch.Tensor, behaviour: torch.Tensor, mask: torch.Tensor) -> TokenTerms:
    return TokenTerms(now=now, old=now, behaviour=behaviour, reference=None, mask=mask)


def weigh(kind: str, ratios: list[float], cap: float) -> list[float]:
    """Of the tokens of one completion."""
    if kind.startswith("sequence"):
        ratios = [math.prod(ratios)] * len(ratios)
    if kind.endswith("truncate"):
        return [min(ratio, cap) for ratio in ratios]
    return [ratio if ratio <= cap else 0.0 for ratio in ratios]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [1.2, 2.0, 50.0])
def test_weights_of_each_kind(kind: Importance, cap: float) -> None:
    draw = torch.Generator().manual_seed(3)
    old, behaviour = (torch.randn(6, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    lengths = [5, 1, 3, 2, 5, 4]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    weights, capped = importance_weights(terms(old, behaviour, mask), kind, cap)
    for row, length in enumerate(lengths):
        ratios = (old - behaviour)[row, :length].exp().tolist()
        assert weights[row, :length].tolist() == pytest.approx(weigh(kind, ratios, cap))
        above = weigh(kind.split("_")[0] + "_mask", ratios, cap)
        assert capped[row].tolist() == [w == 0.0 for w in above] + [False] * (5 - length)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_policy_itself_drew_weighs_one(kind: Importance) -> None:
    own = torch.randn(4, 3)
    weights, capped = importance_weights(terms(own, own, torch.ones(4, 3, dtype=torch.bool)), kind, 1.5)
    assert torch.equal(weights, torch.ones(4, 3))
    assert not capped.any()


def test_by_sequence_an_average_over_what_another_policy_drew_is_one_over_ours() -> None:
    """All 9 completions of two tokens out of three, each as often as the other policy draws it."""
    ours, theirs = (torch.randn(3, 3, dtype=torch.float64).log_softmax(1) for _ in range(2))
    first, second = torch.arange(9) // 3, torch.arange(9) % 3
    # the second token's distribution hangs on the first
    log_ours = torch.stack([ours[0][first], ours[first, second]], dim=1)
    log_theirs = torch.stack([theirs[0][first], theirs[first, second]], dim=1)
    value = torch.randn(9, dtype=torch.float64)
    mask = torch.ones(9, 2, dtype=torch.bool)
    weights, _ = importance_weights(terms(log_ours, log_theirs, mask), "sequence_truncate", 1e9)
    drawn = (log_theirs.sum(1).exp() * weights[:, 0] * value).sum()
    assert float(drawn) == pytest.approx(float((log_ours.sum(1).exp() * value).sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_weighs_as_it_is_asked_to(kind: Importance) -> None:
    old = torch.zeros(1, 3, dtype=torch.float64)
    ratios = [4.0, 0.5, 1.0]
    behaviour = -torch.tensor([ratios], dtype=torch.float64).log()
    surrogate = Surrogate("token", 0.2, 0.2, kind, 1.5, "token", "reverse")
    mask = torch.ones(1, 3, dtype=torch.bool)
    terms = policy_loss(
        TokenTerms(old, old, behaviour, None, mask),
        weighted(torch.tensor([2.0], dtype=torch.float64)),
        surrogate,
        Denominators(1, 3, 3),
    )
    assert float(terms.loss) == pytest.approx(-2.0 * sum(weigh(kind, ratios, 1.5)) / 3)
    assert int(terms.capped) == (3 if kind.startswith("sequence") else 1)
