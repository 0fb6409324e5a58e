"""Log-probs against the plain formula; neither cuts of a batch nor a shared prompt change anything."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from frpo import logprobs
from frpo.config import ConfigError
from frpo.logprobs import LogprobModel, completion_logprobs
from frpo.packing import cut_micro_batches, pack_lengths, packs_of, pad_packs, pad_values, split_ranks
from tests.support.architectures import GPT2, SMALL, build
from tests.support.builders import weigh
from tests.support.models import naive_logprobs, sequences

APART = np.arange(80)[:, None]
"""Every row a pack of its own."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=190,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("group", [1, 4])
def test_equal_to_plain_log_softmax_for_any_budget(model: LlamaForCausalLM, group: int) -> None:
    data = sequences(20, group=group)
    truth = naive_logprobs(model, data)
    for budget in (1, 40, 10_000):
        logprobs = completion_logprobs(LogprobModel(model), data, temperature=1.0, budget_tokens=budget)
        np.testing.assert_allclose(logprobs, truth, atol=2e-5)


def test_temperature_and_entropy(model: LlamaForCausalLM) -> None:
    data = sequences(3, seed=4)
    scores = LogprobModel(model)(pad_packs(data, list(APART[:3])), 0.7)
    ids = torch.from_numpy(data.tokens[: data.lengths[0]].astype(np.int64))
    logp = torch.log_softmax(model(ids[None]).logits[0] / 0.7, -1)
    at = int(data.prompt_lengths[0])
    assert float(scores.logprobs[0, 0]) == pytest.approx(float(logp[at - 1, ids[at]]), abs=1e-5)
    assert float(scores.entropy[0, 0]) == pytest.approx(
        float(-(logp[at - 1].exp() * logp[at - 1]).sum()), abs=1e-5
    )
    assert not scores.entropy.requires_grad
    assert scores.mask.sum() == data.num_completion_tokens
    assert float(scores.logprobs[~scores.mask].abs().sum()) == 0


def test_chunks_with_recomputation_give_the_same_gradient(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sequences(80, seed=2)
    weights = torch.randn(80, 7, generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        model.zero_grad()
        scores = LogprobModel(model)(pad_packs(data, list(APART)))
        (scores.logprobs * weights[:, : scores.mask.shape[1]]).sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    whole = gradient()
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 1)  # 256 positions: the least
    torch.testing.assert_close(gradient(), whole, rtol=1e-4, atol=1e-5)


SHARING = {
    "Llama": SMALL,
    "Mistral": {**SMALL, "sliding_window": None},
    "Qwen2": SMALL,
    "Qwen3": {**SMALL, "head_dim": 16},
    "Gemma": {**SMALL, "head_dim": 16},
    "Phi3": {**SMALL, "pad_token_id": 0},
    "Olmo2": SMALL,
    "GPT2": GPT2,
}
APART_ONLY = {
    "Mistral": {**SMALL, "sliding_window": 4},
    "Gemma3Text": {**SMALL, "head_dim": 16},
    "Mamba": {"vocab_size": 190, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "Bloom": {"vocab_size": 190, "hidden_size": 32, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize(
    ("attention", "stance"),
    [
        ("sdpa", "default"),
        ("eager", "default"),
        pytest.param("flex_attention", "force_eager", marks=pytest.mark.long),
        pytest.param("flex_attention", "default", marks=pytest.mark.long),
    ],
    ids=["sdpa", "eager", "flex_attention", "compiled flex_attention"],
)
@pytest.mark.parametrize("kind", SHARING)
def test_completions_that_share_a_prompt_keep_their_numbers(
    kind: str, attention: str, stance: str, request: pytest.FixtureRequest
) -> None:
    if (kind, attention) == ("GPT2", "flex_attention"):
        pytest.skip("transformers has none of it")
    torch.compiler.set_stance(stance)  # the C++ compiler takes half a minute for each kernel
    request.addfinalizer(lambda: torch.compiler.set_stance("default"))
    net = build(kind, SHARING[kind], attention)
    data = sequences(24, group=6)
    packs = packs_of(data, np.arange(24), budget_tokens=100, reach=LogprobModel(net).reach())
    assert [len(p) for p in packs] == [6, 6, 6, 6]
    truth = naive_logprobs(net, data)
    np.testing.assert_allclose(
        completion_logprobs(LogprobModel(net), data, temperature=1.0, budget_tokens=100), truth, atol=1e-4
    )
    batch = pad_packs(data, packs)
    with torch.no_grad():  # flex attention has no gradients on CPUs
        unmasked = LogprobModel(net)(replace(batch, segments=None)).logprobs[batch.mask].numpy()
    assert (
        np.abs(unmasked - truth).max() > 0.1
    )  # completions that see each other have other numbers: the mask is at work


def test_blocks_hide_what_the_mask_hides_and_skip_what_is_empty() -> None:
    data = sequences(24, group=6)
    packs = packs_of(data, np.arange(24), budget_tokens=100_000, reach=logprobs.EVERYTHING)
    batch = pad_packs(data, packs)
    blocks, visible = batch.blocks(), batch.visible()
    assert visible is not None
    there = torch.stack(
        [
            torch.stack(
                [
                    blocks.mask_mod(
                        torch.tensor(b), torch.tensor(0), torch.tensor(own), torch.arange(visible.shape[-1])
                    )
                    for own in range(visible.shape[-1])
                ]
            )
            for b in range(len(packs))
        ]
    )
    assert torch.equal(there, visible[:, 0])
    long = torch.cat([torch.zeros(128), *(torch.full((128,), float(i)) for i in range(1, 9))]).long()[None]
    apart = replace(batch, tokens=long, positions=long, segments=long).blocks()
    assert apart.sparsity() == pytest.approx(
        100 * (1 - (1 + 8 * 2) / 81), abs=0.1
    )  # the prompt's block, and two of each completion


@pytest.mark.parametrize("kind", APART_ONLY)
def test_models_that_cannot_share_a_prompt_do_not(kind: str) -> None:
    assert LogprobModel(build(kind, APART_ONLY[kind], "eager")).reach() == 0


@pytest.mark.parametrize("group", [1, 6])
@pytest.mark.parametrize("cut", [1, 30, 90, 100_000])
def test_any_cut_gives_the_same_gradient_in_float64(cut: int, group: int) -> None:
    """The whole path: packs, ranks, micro-batches, model, loss; the truth has every sequence apart, in one
    batch."""
    from frpo.objective import Denominators, Surrogate, TokenTerms, policy_loss

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=190,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    net = LlamaForCausalLM(config).double()
    data, rng = sequences(24, group=group), np.random.default_rng(0)
    advantages = rng.normal(size=24).astype(np.float32)
    behaviour = -rng.random(data.num_completion_tokens).astype(np.float32)

    def gradient(budget: int, ranks: int, reach: int) -> torch.Tensor:
        net.zero_grad()
        packs = packs_of(data, np.arange(24), budget_tokens=budget, reach=reach)
        lengths = pack_lengths(data, packs)
        for mine in split_ranks(lengths, ranks):
            for batch in cut_micro_batches(lengths[mine], budget):
                chosen = [packs[i] for i in mine[batch]]
                rows = np.concatenate(chosen)
                now = LogprobModel(net)(pad_packs(data, chosen))
                logp = now.logprobs.double()
                drawn = pad_values(behaviour, data, rows, now.mask.shape[1]).double()
                policy_loss(
                    TokenTerms(logp, logp.detach(), drawn, None, now.mask),
                    weigh(torch.from_numpy(advantages[rows]).double()),
                    Surrogate("token", 0.2, 0.2, "token_truncate", 2.0, "token"),
                    Denominators(24, data.num_completion_tokens, max_tokens=7),
                ).loss.backward()
        return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])

    whole = gradient(100_000, 1, 0)
    relative = (gradient(cut, 3, LogprobModel(net).reach()) - whole).norm() / whole.norm()
    assert relative < 1e-6


GEMMA = {**SMALL, "head_dim": 16}
SHAPED = {
    "Granite": ({**SMALL, "logits_scaling": 8.0}, {"logits_scaling": 1.0}),
    "Cohere": ({**SMALL, "logit_scale": 0.0625}, {"logit_scale": 1.0}),
    "Gemma2": ({**GEMMA, "final_logit_softcapping": 1.0}, {"final_logit_softcapping": None}),
    "FalconH1": (
        {
            **SMALL,
            "head_dim": 16,
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
        },
        None,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPED)
def test_models_that_shape_their_logits_are_refused_and_their_plain_kin_are_not(
    kind: str, dtype: torch.dtype
) -> None:
    settings, neutral = SHAPED[kind]
    with pytest.raises(
        ConfigError,
        match=r"^model\.path: a model of type \w+ makes its logits otherwise .* differ by \d.*; choose",
    ):
        LogprobModel(build(kind, settings).to(dtype))
    if neutral is not None:
        LogprobModel(build(kind, {**settings, **neutral, "embedding_multiplier": 12.0}).to(dtype))


def test_logits_that_are_shaped_under_no_known_name_are_refused(model: LlamaForCausalLM) -> None:
    forward = model.forward
    for shape in (
        lambda x: x + torch.arange(190),
        lambda x: x * 0.9,
        lambda x: x[..., :180],
        lambda x: x * float("nan"),
    ):
        model.forward = lambda *a, shape=shape, **k: SimpleNamespace(logits=shape(forward(*a, **k).logits))
        with pytest.raises(ConfigError, match="makes its logits otherwise"):
            LogprobModel(model)
    del model.forward
    LogprobModel(model.train())
    assert model.training
    assert model.eval().config._attn_implementation == "sdpa"


def test_a_head_that_takes_other_states_than_the_bodys_is_refused() -> None:
    config = transformers.ElectraConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        embedding_size=16,
    )
    with pytest.raises(
        ConfigError, match="a model of type electra makes its logits otherwise than by its head alone"
    ):
        LogprobModel(AutoModelForCausalLM.from_config(config))
