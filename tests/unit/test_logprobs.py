"""Log-probs against the plain formula, and cuts of a batch that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from frpo import logprobs
from frpo.logprobs import Scorer, completion_logprobs, micro_batches, pad, pad_values, split_ranks
from tests.ray.helpers import naive_logprobs, sequences


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=190, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    return LlamaForCausalLM(config).eval()


def test_equal_to_plain_log_softmax_for_any_budget(model: LlamaForCausalLM) -> None:
    data = sequences(20)
    truth = naive_logprobs(model, data)
    for budget in (1, 40, 10_000):
        found = completion_logprobs(Scorer(model), data, temperature=1.0, budget_tokens=budget)
        np.testing.assert_allclose(found, truth, atol=2e-5)


def test_temperature_and_entropy(model: LlamaForCausalLM) -> None:
    data = sequences(3, seed=4)
    found = Scorer(model)(pad(data, np.arange(3)), 0.7)
    ids = torch.from_numpy(data.tokens[: data.lengths[0]].astype(np.int64))
    logp = torch.log_softmax(model(ids[None]).logits[0] / 0.7, -1)
    at = int(data.prompt_lengths[0])
    assert float(found.logprobs[0, 0]) == pytest.approx(float(logp[at - 1, ids[at]]), abs=1e-5)
    assert float(found.entropy[0, 0]) == pytest.approx(float(-(logp[at - 1].exp() * logp[at - 1]).sum()), abs=1e-5)
    assert not found.entropy.requires_grad
    assert found.mask.sum() == data.num_completion_tokens
    assert float(found.logprobs[~found.mask].abs().sum()) == 0


def test_chunks_with_recomputation_give_the_same_gradient(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sequences(80, seed=2)
    weights = torch.randn(80, 7, generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        model.zero_grad()
        found = Scorer(model)(pad(data, np.arange(80)))
        (found.logprobs * weights[:, : found.mask.shape[1]]).sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    whole = gradient()
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 1)  # 256 positions: the least
    torch.testing.assert_close(gradient(), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 30, 90, 100_000])
def test_any_cut_gives_the_same_gradient_in_float64(cut: int) -> None:
    """The whole path: ranks, micro-batches, model, loss."""
    from frpo.objective import policy_loss

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=190, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    net = LlamaForCausalLM(config).double()
    data, rng = sequences(24), np.random.default_rng(0)
    advantages = rng.normal(size=24).astype(np.float32)
    behaviour = -rng.random(data.num_completion_tokens).astype(np.float32)

    def gradient(budget: int, ranks: int) -> torch.Tensor:
        net.zero_grad()
        for mine in split_ranks(data.lengths, ranks):
            for batch in micro_batches(data.lengths[mine], budget):
                rows = mine[batch]
                now = Scorer(net)(pad(data, rows))
                logp = now.logprobs.double()
                policy_loss(
                    logp, logp.detach(), pad_values(behaviour, data, rows, now.mask.shape[1]).double(), None,
                    torch.from_numpy(advantages[rows]).double(), now.mask, beta=0.0, ratio="token", clip_low=0.2, clip_high=0.2,
                    importance_cap=2.0, aggregation="token", num_completions=24, num_tokens=data.num_completion_tokens, max_tokens=7,
                ).loss.backward()  # fmt: skip
        return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])

    whole = gradient(100_000, 1)
    relative = (gradient(cut, 3) - whole).norm() / whole.norm()
    assert relative < 1e-6


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200), st.integers(1, 5))
def test_cuts_cover_every_sequence_once_and_keep_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(int(i) for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)
    shares = split_ranks(lengths, ranks)
    assert sorted(int(i) for s in shares for i in s) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in s) for s in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_a_batch_that_is_large_enough_is_not_stretched() -> None:
    lengths = [50] * 20 + [100] * 20 + [400]
    assert [len(b) for b in micro_batches(lengths, 100_000)] == [41]
    found = micro_batches(lengths, 100_000, stretch=1.15)  # 1,000 tokens are enough to close the short ones
    assert [(len(b), lengths[b[0]], lengths[b[-1]]) for b in found] == [(20, 50, 50), (20, 100, 100), (1, 400, 400)]
    assert [len(b) for b in micro_batches([10, 12, 300], 100_000, stretch=1.15)] == [2, 1]
    assert [len(b) for b in micro_batches([10, 12, 200], 100_000, stretch=1.15)] == [3]  # too few tokens to be worth a batch


def test_models_that_reshape_their_logits_are_refused(model: LlamaForCausalLM) -> None:
    model.config.final_logit_softcapping = 30.0
    try:
        with pytest.raises(ValueError, match="final_logit_softcapping"):
            Scorer(model)
    finally:
        del model.config.final_logit_softcapping
