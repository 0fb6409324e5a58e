"""Who pays the KL penalty, and how much: exact expectations over small policies, and the gate by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frpo.batching import make_batch
from frpo.config import ObjectiveConfig
from frpo.objective import Denominators, Groups, Surrogate, TokenTerms, policy_loss, reverse_penalty
from frpo.penalties import split_kl
from frpo.stats import BatchStats
from frpo.types import Completion, Group, Prompt, Reward, RolloutBatch, ScoredGroup
from tests.support.builders import weigh

SURROGATE = Surrogate("token", 0.2, 0.2, "token_truncate", 2.0, "sum")


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


# ---- by token


def two_tokens(seed: int) -> Tensor:
    """Logits of three first tokens, and of three second ones after each: `[4, 3]`."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descent_of(surrogate: Surrogate, logits: Tensor, reference: Tensor) -> Tensor:
    """Expected gradient of the penalty alone, over all completions of two tokens that the policy draws."""
    own = torch.log_softmax(logits, 1)
    theirs = torch.log_softmax(reference, 1)
    total = torch.zeros_like(logits)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for first in range(3):
        for second in range(3):
            now = torch.stack([own[0, first], own[1 + first, second]])[None]
            other = torch.stack([theirs[0, first], theirs[1 + first, second]])[None]
            terms = TokenTerms(now, now.detach(), now.detach(), other, mask)
            loss = policy_loss(
                terms, weigh(torch.zeros(1).double(), beta=1.0), surrogate, Denominators(1, 2, 1)
            )
            (gradient,) = torch.autograd.grad(loss.loss, logits, retain_graph=True)
            total += now.detach().sum().exp() * gradient
    return total


def test_the_token_penalty_descends_the_kl_of_each_next_token_and_not_of_the_whole() -> None:
    logits, reference = two_tokens(0).requires_grad_(), two_tokens(1)
    p, q = torch.softmax(logits, 1), torch.softmax(reference, 1)
    reached = p[0].detach()  # how often each prefix is met counts, and is not moved
    of_tokens = kl(p[0], q[0]) + sum(reached[i] * kl(p[1 + i], q[1 + i]) for i in range(3))
    whole = kl(p[0], q[0]) + sum(p[0, i] * kl(p[1 + i], q[1 + i]) for i in range(3))
    own, full = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (of_tokens, whole))
    found = descent_of(replace(SURROGATE, penalty="token"), logits, reference)
    torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-12)
    assert (found - full).abs().max() > 0.01


def test_a_token_pays_by_the_policy_in_training_whoever_drew_it() -> None:
    """ratio x importance = policy / behaviour, up to the cap."""
    now = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    drawn = torch.tensor([[-1.2, -1.5]], dtype=torch.float64)
    old = torch.tensor([[-1.1, -1.9]], dtype=torch.float64)
    terms = TokenTerms(now, old, drawn, now - 0.5, torch.ones(1, 2, dtype=torch.bool))
    surrogate = replace(SURROGATE, penalty="token")
    loss = policy_loss(terms, weigh(torch.zeros(1).double(), beta=0.3), surrogate, Denominators(1, 2, 2)).loss
    k3 = np.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(0.3 * k3 * (np.exp(0.2) + np.exp(-0.5)) / 2)


def test_each_completion_pays_by_its_own_weight() -> None:
    now = torch.zeros(2, 1, dtype=torch.float64)
    terms = TokenTerms(now, now, now, now - 0.5, torch.ones(2, 1, dtype=torch.bool))
    weights = replace(weigh(torch.zeros(2).double()), betas=torch.tensor([0.5, 0.0]))
    loss = policy_loss(terms, weights, SURROGATE, Denominators(2, 2, 1))
    k3 = np.exp(-0.5) + 0.5 - 1
    assert loss.loss.item() == pytest.approx(0.5 * k3 / 2)
    assert loss.penalty_sum.item() == pytest.approx(2 * k3)  # measured all the same


# ---- the gate, by enumeration


REFERENCE = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
LOGITS = torch.tensor([0.0, 2.0, -1.0, 0.5, 1.0, -2.0], dtype=torch.float64)
SUCCESS = torch.tensor([True, True, False, True, False, True])


def test_the_gate_descends_the_kl_within_the_successes_alone() -> None:
    """Of s successes in a group their own mean takes one: E[(s - 1)+] / k of k = 2 is policy(S)^2 / 2."""
    logits = LOGITS.clone().requires_grad_()
    log_p = torch.log_softmax(logits, 0)
    p = log_p.detach().exp()
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    log_ratio = (p.log() - REFERENCE.log())[pairs]
    one = torch.ones(len(pairs), 1, dtype=torch.float64)
    advantages = reverse_penalty(Groups.of(log_ratio, SUCCESS[pairs]), one)
    losses = -(advantages * log_p[pairs]).mean(dim=1)
    (found,) = torch.autograd.grad((p[pairs].prod(dim=1) * losses).sum(), logits, retain_graph=True)

    policy = log_p.exp()
    share = p[SUCCESS].sum()
    within = kl(policy[SUCCESS] / policy[SUCCESS].sum(), REFERENCE[SUCCESS] / REFERENCE[SUCCESS].sum())
    (claimed,) = torch.autograd.grad(within, logits)
    torch.testing.assert_close(found, share**2 / 2 * claimed, rtol=1e-9, atol=1e-12)
    assert found[~SUCCESS].abs().max() < 1e-12  # no failure is pulled back


def test_the_parts_of_a_kl_are_those_of_the_chain_rule() -> None:
    """On draws in the policy's own proportions."""
    p = torch.tensor([0.1, 0.3, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64)
    drawn = torch.repeat_interleave(torch.arange(6), (p * 1000).round().long())
    log_ratio = (p.log() - REFERENCE.log())[drawn].numpy()
    failing, outcome, success, failure = split_kl(log_ratio, SUCCESS[drawn].numpy())
    good, bad = p[SUCCESS].sum(), p[~SUCCESS].sum()
    ref_good, ref_bad = REFERENCE[SUCCESS].sum(), REFERENCE[~SUCCESS].sum()
    assert failing == pytest.approx(0.4)
    assert outcome == pytest.approx(float(kl(torch.stack([good, bad]), torch.stack([ref_good, ref_bad]))))
    assert success == pytest.approx(float(good * kl(p[SUCCESS] / good, REFERENCE[SUCCESS] / ref_good)))
    assert failure == pytest.approx(float(bad * kl(p[~SUCCESS] / bad, REFERENCE[~SUCCESS] / ref_bad)))
    assert outcome + success + failure == pytest.approx(float(kl(p, REFERENCE)))


@pytest.mark.parametrize("log_ratio", [[0.5, -800.0, 3.0], [900.0, 0.0, 1.0]])
def test_parts_of_extreme_ratios_stay_finite_and_add_up(log_ratio: list[float]) -> None:
    _, *parts = split_kl(np.array(log_ratio), np.array([True, True, False]))
    assert sum(parts) == pytest.approx(np.mean(log_ratio))
    assert min(parts[1:]) >= 0


def test_where_all_succeed_there_is_no_failure_to_part_from() -> None:
    failing, outcome, success, failure = split_kl(np.array([0.0, 1.0]), np.array([True, True]))
    gain = np.log((1 + np.exp(-1)) / 2)
    assert (failing, failure) == (0.0, 0.0)
    assert (outcome, success) == pytest.approx((-gain, 0.5 + gain))


# ---- the gate in a batch


def scored(index: int, task: str, rewards: list[float | None], ratios: list[float]) -> ScoredGroup:
    """Completions of one token with the given log policy - log reference."""
    prompt = Prompt(f"p:{index}", "prompt", np.array([1], np.int32), task, {})
    zero = np.zeros(1, np.float32)
    tokens = [np.array([10 * index + j], np.int32) for j in range(len(rewards))]
    drawn = tuple(Completion(ids, zero, np.zeros(1, np.int32), "c", "stop") for ids in tokens)
    totals = tuple(Reward(r, {}, None if r is not None else "broke") for r in rewards)
    reference = tuple(np.array([-ratio], np.float32) for ratio in ratios)
    return ScoredGroup(Group(index, prompt, drawn), totals, reference, (zero,) * len(rewards))


def batch_of(*groups: ScoredGroup, **objective: Any) -> tuple[RolloutBatch, BatchStats]:
    settings = {"estimator": {"kind": "grpo"}, "beta": 0.1, "gate": {"tasks": ["harmful"]}, **objective}
    return make_batch(groups, ObjectiveConfig.model_validate(settings))


def test_a_failure_on_a_protected_task_pays_nothing() -> None:
    group = scored(0, "harmful", [1.0, 0.4, 0.5], [0.0, 9.0, 4.0])
    batch, _ = batch_of(group)
    own = np.array([1.0, 0.4, 0.5]) - 1.9 / 3
    np.testing.assert_allclose(batch.advantages, own + np.array([0.2, 0.0, -0.2]), atol=1e-6)
    np.testing.assert_allclose(batch.betas, [0.1, 0.0, 0.1])


def test_another_task_pays_for_all_and_by_its_own_factor() -> None:
    groups = scored(0, "harmless", [1.0, 0.0], [0.0, 2.0]), scored(1, "harmful", [1.0, 0.9], [0.0, 2.0])
    batch, _ = batch_of(*groups, beta_of={"harmless": 0.5})
    np.testing.assert_allclose(batch.advantages, [0.55, -0.55, 0.15, -0.15], atol=1e-6)
    np.testing.assert_allclose(batch.betas, [0.05, 0.05, 0.1, 0.1])


@pytest.mark.parametrize(
    ("rewards", "ratios"),
    [([0.0, 0.2, 0.4], [1.0, 2.0, 9.0]), ([1.0, 0.2, None], [1.0, 2.0, 9.0])],  # none, and one alone
)
def test_fewer_than_two_successes_pay_nothing(rewards: list[float | None], ratios: list[float]) -> None:
    free, _ = batch_of(scored(0, "harmful", rewards, ratios), beta=1e-9)
    paid, _ = batch_of(scored(0, "harmful", rewards, ratios), beta=5.0)
    np.testing.assert_allclose(paid.advantages, free.advantages, atol=1e-6)


def test_a_failure_far_from_the_reference_pays_in_spite_of_the_gate() -> None:
    batch, _ = batch_of(scored(0, "harmful", [0.0, 0.0, 1.0], [20.0, 21.0, 1.0]))
    np.testing.assert_allclose(batch.advantages, [-1 / 3, -1 / 3 - 1.0, 2 / 3 + 1.0], atol=1e-6)
    np.testing.assert_allclose(batch.betas, [0.0, 0.1, 0.1])


def test_the_threshold_is_the_users() -> None:
    group = scored(0, "harmful", [0.9, 0.8, 0.6], [0.0, 2.0, 7.0])
    batch, _ = batch_of(group, gate={"tasks": ["harmful"], "threshold": 0.75}, penalty="k3")
    np.testing.assert_allclose(batch.betas, [0.1, 0.1, 0.0])
    np.testing.assert_allclose(batch.advantages, np.array([0.9, 0.8, 0.6]) - 2.3 / 3, atol=1e-6)


def test_the_parts_of_the_protected_tasks_are_logged() -> None:
    groups = (
        scored(0, "harmful", [1.0, 0.0, None], [0.5, -0.5, 90.0]),
        scored(1, "harmful", [1.0, 0.0, 0.0], [1.0, 2.0, 2.0]),
        scored(2, "harmless", [1.0, 0.0, 0.0], [70.0, 80.0, 90.0]),
    )
    _, stats = batch_of(*groups)
    assert stats.gate is not None
    # every side of equal ratios: all of the KL is of the outcome
    assert stats.gate.failing_share == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert stats.gate.kl_outcome == pytest.approx((0 + 5 / 3) / 2, rel=1e-6)
    assert (stats.gate.kl_success, stats.gate.kl_failure) == pytest.approx((0, 0), abs=1e-12)


def test_at_the_threshold_it_is_a_success_and_a_group_without_rewards_is_none() -> None:
    groups = (
        scored(0, "harmful", [0.5, 0.4], [1.0, 3.0]),
        scored(1, "harmful", [None, None], [7.0, 9.0]),
    )
    batch, stats = batch_of(*groups)
    assert stats.gate is not None
    assert stats.gate.failing_share == 0.5
    assert stats.gate.kl_outcome == pytest.approx(2.0)
    np.testing.assert_allclose(batch.betas, [0.1, 0.0])


def test_without_a_gate_or_a_protected_group_nothing_is_logged() -> None:
    _, plain = batch_of(scored(0, "harmful", [1.0, 0.0], [0.0, 1.0]), gate=None)
    _, other = batch_of(scored(0, "harmless", [1.0, 0.0], [0.0, 1.0]))
    assert (plain.gate, other.gate) == (None, None)


@pytest.mark.parametrize("field", [{"gate": {"tasks": ["harmful"]}}, {"beta_of": {"harmful": 0.5}}])
def test_without_a_penalty_there_is_nothing_to_gate(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"harmful would have a penalty of their own, and beta is 0"):
        ObjectiveConfig.model_validate({"beta": 0.0, **field})
