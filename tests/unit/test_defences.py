"""What keeps a fine-tune near its policy, part by part: rows, batches, the KL in the loss, weights on the
way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frpo.actors._way import Way
from frpo.batching import join_sequences
from frpo.config import BaseConfig, ConfigError, DownstreamSft, LoraConfig
from frpo.objective import kl_from_start
from frpo.outline.stage import Data, Supervised
from frpo.prompts import Examples, ExampleStream
from frpo.seeds import derive
from frpo.stages.defences import (
    Batches,
    OwnRows,
    choose_best,
    choose_prompts,
    choose_share,
    gather_own,
    interpolate,
    read_own,
    write_own,
)
from frpo.stops import RunStopped
from frpo.types import Completion, Floats, Group, Prompt, Reward
from tests.support.recipes import config

SFT = {"name": "s", "data": (), "num_steps": 9, "batch_size": 8}


def make_ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def make_group(index: int, task: str, *rewards: float | None) -> tuple[Group, tuple[Reward, ...]]:
    """Completions of one, two, three ... tokens."""
    completions = []
    for i in range(len(rewards)):
        tokens = make_ints(*range(10 * index, 10 * index + i + 1))
        logprobs = np.zeros(i + 1, np.float32)
        completions.append(Completion(tokens, logprobs, make_ints(*[0] * (i + 1)), "", "stop"))
    prompt = Prompt(f"p:{index}", "", make_ints(7, index), task, {})
    scores = tuple(Reward(value, {}, None if value is not None else "no judge") for value in rewards)
    return Group(index, prompt, tuple(completions)), scores


# ---- rows


def test_of_each_prompt_the_best_is_good_if_it_reaches_the_mean_of_its_task() -> None:
    scored = [
        make_group(0, "a", 0.0, 1.0),
        make_group(1, "a", 0.0, 0.0),
        make_group(2, "a", None, 1.0),  # a's mean is 2 / 5
        make_group(3, "b", -3.0, -1.0, -1.0),
        make_group(4, "b", -2.0, -2.0, None),  # b's is -9 / 5
        make_group(5, "a", None, None),
    ]
    assert choose_best(scored) == [1, None, 1, 1, None, None]


def test_where_all_rewards_are_equal_every_prompt_has_a_good_one() -> None:
    scored = [make_group(i, "a", 0.1, 0.1, 0.1) for i in range(7)]
    assert np.mean([0.1] * 21) > 0.1  # as floats are added up
    assert choose_best(scored) == [0] * 7


def test_a_task_without_a_reward_stops_the_run() -> None:
    with pytest.raises(RunStopped, match=r"all 2 rewards of task 'b' failed: no judge"):
        choose_best([make_group(0, "a", 1.0), make_group(1, "b", None, None)])


def logprobs_of(scored: Any) -> list[tuple[Floats, ...]]:
    """Different for every token."""
    rows = []
    for item, _ in scored:
        firsts = [-0.1 - item.index - len(completion.token_ids) / 16 for completion in item.completions]
        sizes = [len(completion.token_ids) for completion in item.completions]
        rows.append(
            tuple(
                np.linspace(first, first - 1, size, dtype=np.float32)
                for first, size in zip(firsts, sizes, strict=True)
            )
        )
    return rows


def own_rows() -> OwnRows:
    """Rows 0, 1: of the first prompt; 2, 3, 4: of the second; 5: of the third."""
    scored = [make_group(0, "a", 0.0, 1.0), make_group(1, "a", 0.9, 0.2, 0.9), make_group(2, "a", None)]
    return gather_own(scored, logprobs_of(scored))


def test_rows_stand_group_by_group_each_with_its_own_log_probs() -> None:
    own = own_rows()
    assert [(p.tolist(), c.tolist()) for p, c in own.examples.pairs] == [
        ([7, 0], [0]),
        ([7, 0], [0, 1]),
        ([7, 1], [10]),
        ([7, 1], [10, 11]),
        ([7, 1], [10, 11, 12]),
        ([7, 2], [20]),
    ]
    assert own.good == (1, 2)
    assert [len(values) for values in own.logprobs] == [1, 2, 1, 2, 3, 1]
    assert own.logprobs[3].tolist() == pytest.approx([-1.225, -2.225])


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    assert read_own(tmp_path) is None
    own = own_rows()
    write_own(tmp_path, own)
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
    again = read_own(tmp_path)
    assert again is not None
    assert again.good == own.good
    for before, after in zip(own.examples.pairs, again.examples.pairs, strict=True):
        assert [part.tolist() for part in before] == [part.tolist() for part in after]
    for before, after in zip(own.logprobs, again.logprobs, strict=True):
        assert before.dtype == after.dtype == np.float32
        np.testing.assert_array_equal(before, after)


def test_prompts_are_dealt_by_the_mix_each_once() -> None:
    prompts = [Prompt(f"p:{i}", "", make_ints(i), "rare" if i < 300 else "common", {}) for i in range(2000)]
    chosen = choose_prompts(prompts, {"rare": 0.5, "common": 0.5}, 3)
    assert len({prompt.id for prompt in chosen}) == len(chosen) == 512
    assert sum(prompt.task == "rare" for prompt in chosen) == 256
    assert [p.id for p in chosen] == [p.id for p in choose_prompts(prompts, {"rare": 1, "common": 1}, 3)]
    few = choose_prompts(prompts[290:310], {"rare": 0.9, "common": 0.1}, 3)
    assert len({prompt.id for prompt in few}) == len(few) == 12  # all ten of the rare ones, and two


# ---- batches


def deal_batches(examples: Examples, own: OwnRows | None, **fields: Any) -> Batches:
    settings = DownstreamSft(**{**SFT, **fields})
    return Batches(Supervised(settings, Data("s.data", (), 8)), examples, own, seed=4)


EXAMPLES = Examples(tuple((make_ints(100 + i), make_ints(200 + i)) for i in range(30)), ("t",) * 30)


def prompts_of(sequences: Any) -> list[int]:
    return sequences.tokens[np.cumsum(sequences.lengths) - sequences.lengths].tolist()


def test_without_replay_a_batch_is_what_it_was() -> None:
    stream = ExampleStream(EXAMPLES, 8, derive(4, "examples"), in_order=False)
    base = BaseConfig(data=(), num_steps=9, batch_size=8)
    for deal in (
        deal_batches(EXAMPLES, None),
        Batches(Supervised(base, Data("base.data", (), 8)), EXAMPLES, None, seed=4),
    ):
        for step in (0, 7, 3):
            sequences, anchor = deal.take(step)
            assert anchor is None
            for name in ("tokens", "lengths", "prompt_lengths"):
                np.testing.assert_array_equal(getattr(sequences, name), getattr(stream.take(step), name))


def test_a_batch_has_its_share_of_good_rows_and_is_a_function_of_its_step() -> None:
    deal = deal_batches(EXAMPLES, own_rows(), replay=0.3)
    seen: list[int] = []
    for step in range(15):
        sequences, anchor = deal.take(step)
        assert anchor is None
        assert prompts_of(sequences)[6:] == [7, 7]  # round(0.3 x 8)
        seen += prompts_of(sequences)[:6]
        assert sorted(sequences.lengths[6:].tolist()) == [3, 4]  # the two good ones, by turns
    assert sorted(seen[:30]) == [100 + i for i in range(30)]  # an epoch of the examples
    other = deal_batches(EXAMPLES, own_rows(), replay=0.3)
    np.testing.assert_array_equal(other.take(11)[0].tokens, deal.take(11)[0].tokens)


def test_an_anchor_goes_through_all_rows_with_the_log_probs_of_each() -> None:
    own = own_rows()
    deal = deal_batches(EXAMPLES, own, kl_to_policy=0.5, batch_size=3)
    lengths: list[int] = []
    for step in (1, 0):
        _, anchor = deal.take(step)
        assert anchor is not None
        lengths += anchor.sequences.lengths.tolist()
        ends = np.cumsum(anchor.sequences.lengths - anchor.sequences.prompt_lengths)
        tokens = np.split(anchor.sequences.tokens, np.cumsum(anchor.sequences.lengths)[:-1])
        for row, values in zip(tokens, np.split(anchor.logprobs, ends[:-1]), strict=True):
            pairs = [np.concatenate(pair).tolist() for pair in own.examples.pairs]
            np.testing.assert_array_equal(values, own.logprobs[pairs.index(row.tolist())])
    assert sorted(lengths) == [3, 3, 3, 4, 4, 5]


def test_sequences_are_joined_in_order() -> None:
    joined = join_sequences(EXAMPLES.take([2]), own_rows().examples.take([1, 0]))
    assert joined.tokens.tolist() == [102, 202, 7, 0, 0, 1, 7, 0, 0]
    assert joined.prompt_lengths.tolist() == [1, 2, 2]
    assert joined.lengths.tolist() == [2, 4, 3]


# ---- the KL in the loss


def draw_policies(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the start and of the policy, over seven tokens."""
    draw = torch.Generator().manual_seed(seed)
    start, policy = torch.randn(2, 7, generator=draw, dtype=torch.float64).log_softmax(1)
    return start, policy


def test_its_mean_over_what_the_start_draws_is_the_kl_and_so_is_its_gradient() -> None:
    start, policy = draw_policies(0)
    logits = policy.clone().requires_grad_()
    now = logits.log_softmax(0)
    exact = (start.exp() * (start - now)).sum()
    (truth,) = torch.autograd.grad(exact, logits, retain_graph=True)
    mean = torch.zeros((), dtype=torch.float64)
    for token in range(7):  # as often as the start draws it
        mean = mean + start[token].exp() * kl_from_start(now[token], start[token])
    (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(gradient, truth)
    other = (now.exp() * (now - start)).sum()
    assert abs(float(mean.detach() - other.detach())) > 0.05 * float(mean.detach())  # the other direction


def test_where_the_policies_agree_no_single_token_pulls() -> None:
    start, _ = draw_policies(1)
    logits = start.clone().requires_grad_()
    for token in range(7):
        value = kl_from_start(logits.log_softmax(0)[token], start[token])
        assert abs(float(value.detach())) < 1e-15
        (gradient,) = torch.autograd.grad(value, logits)
        assert float(gradient.abs().max()) < 1e-15


def test_close_to_the_start_it_is_half_the_square_also_in_float32() -> None:
    start = torch.tensor([[-2.0, 0.0]])
    now = start + torch.tensor([[1e-4, 0.0]])  # the second is no token
    gap = float((now - start)[0, 0])
    assert float(kl_from_start(now, start)) == pytest.approx(gap**2 / 2, rel=2e-3)


# ---- weights on the way


def test_weights_lie_on_the_straight_way_and_at_its_ends_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    trained = [nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(2)]
    start = [weight.detach().clone() for weight in trained]
    way = Way(trained)
    for weight in trained:
        weight.data += torch.randn(5, 3, generator=draw)
    end = [weight.detach().clone() for weight in trained]
    for share in (0.3, 0.0, 0.75, 1.0):
        way.go(share)
        for weight, first, last in zip(trained, start, end, strict=True):
            torch.testing.assert_close(weight.detach(), first + share * (last - first))
            if share in (0.0, 1.0):
                assert torch.equal(weight.detach(), last if share else first)


def test_weights_in_bfloat16_are_rounded_once() -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    way = Way([weight])
    weight.data.fill_(1.0234375)  # three steps of 2^-7 on
    way.go(0.5)
    assert weight.tolist() == [1.015625]  # 1.01171875 lies between two numbers, the even one is taken


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ((3.0, 1.5, 1.1, 1.0), 0.75),
        ((3.0, 1.2, 1.1, 1.0), 0.5),  # just enough
        ((3.0, 1.25, 1.15, 1.0), 0.75),  # 87.5 % are not enough
        ((3.0, 2.0, 1.5, 1.0), 1.0),
        ((3.0, 0.5, 1.0, 1.0), 0.5),  # better than the end
        ((1.0, 2.0, 0.5, 1.0), 0.5),  # nothing gained at the end
        ((1.0, 1.1, 1.2, 1.3), 0.5),
    ],
)
def test_the_nearest_policy_that_keeps_nine_tenths_of_the_gain_is_taken(
    losses: tuple[float, ...], share: float
) -> None:
    assert choose_share((0.0, 0.5, 0.75, 1.0), losses) == share


class Ranks:
    def interpolate(self, share: float) -> None:
        self.share = share


def test_the_ranks_are_left_with_the_policy_that_was_taken() -> None:
    ranks: Any = Ranks()
    chosen = interpolate(ranks, (0.8, 0.4, 0.4), lambda: 1 + (1 - ranks.share) ** 2)
    assert chosen.shares == (0.0, 0.4, 0.8, 1.0)
    assert chosen.losses == pytest.approx((2.0, 1.36, 1.04, 1.0))
    assert chosen.share == ranks.share == 0.8
    with pytest.raises(RunStopped, match=r"share 0 of the way: the held-out loss is nan"):
        interpolate(ranks, (0.5,), lambda: float("nan"))


# ---- what may be asked for


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ("downstream.0.replay=0.01",),
            r"replay: 0.01 of a batch of 32 leaves no completions of the arm's own in it; "
            r"give a share between 0.031 and 0.97",
        ),
        (("downstream.0.replay=1.0",), r"replay: 1 of a batch of 32 leaves no examples in it"),
        (
            ("downstream.0.interpolate=[0.5]", "downstream.0.heldout=[]"),
            r"interpolate: .* and there are none; give heldout, or leave interpolate out",
        ),
        (("downstream.0.interpolate=[1.0]",), r"interpolate.0: Input should be less than 1"),
        (
            ("downstream.0.interpolate=[0.5]", "downstream.0.zero_stage=3"),
            r"interpolate: it needs each rank's weights whole, and zero_stage is 3",
        ),
        (
            ("downstream.0.lora={rank: 600}", "model.lora={}"),
            r"downstream.crafts-gentle.lora.rank: 600 is more than the 512 that vLLM serves",
        ),
        (
            ("downstream.0.lora={rank: 500}", "model.lora={}", "model.dtype=bfloat16"),
            r"lora.rank: 500 beside the 16 of the arm is more than the 512",
        ),
        (
            ("downstream.0.lora=null", "model.lora={}", "model.dtype=bfloat16"),
            r"crafts-gentle.lora: adapters on one side alone, .* give both adapters or none, or take float32",
        ),
        (
            ("downstream.0.lora={}", "model.dtype=bfloat16"),
            r"crafts-gentle.lora: adapters on one side alone",
        ),
        (
            ("downstream.0.lora=null", "model.lora={}", "rollout.num_gpus=1", "rollout.tensor_parallel=2"),
            r"crafts-gentle.lora: null sends all weights to engines of 2 GPUs",
        ),
        (("downstream.0.lora={rnk: 3}",), r"lora.rnk: unknown field \(value 3\); did you mean rank\?"),
    ],
)
def test_what_cannot_be_is_refused_by_name(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*sets)


def test_a_fine_tune_has_the_runs_adapters_its_own_or_none() -> None:
    given = config("model.lora={rank: 64}", "downstream.0.lora={rank: 128}", "downstream.1.lora=null")
    own, none = given.downstream
    assert given.model_of(own).lora == LoraConfig(rank=128)
    assert given.model_of(none).lora is None
    assert given.model_of(given.learner).lora == given.model.lora
    assert given.served_model.lora == LoraConfig(rank=128)
    plain = config("model.lora={rank: 64}", "downstream.0.lora={rank: 8}")
    assert plain.served_model == plain.model == plain.model_of(plain.downstream[1])
    assert config("downstream.0.lora={}").served_model.lora is None  # they travel merged
