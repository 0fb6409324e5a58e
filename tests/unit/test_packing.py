"""Packs and micro-batches: every sequence once, within the budget, laid out as the mask says."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.batching import flatten
from frpo.packing import cut_micro_batches, pack_lengths, packs_of, pad_packs, split_ranks
from tests.support.models import sequences


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200), st.integers(1, 5))
def test_cuts_cover_every_sequence_once_and_keep_the_budget(
    lengths: list[int], budget: int, ranks: int
) -> None:
    batches = cut_micro_batches(lengths, budget)
    assert sorted(int(i) for i in chain.from_iterable(batches)) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)
    shares = split_ranks(lengths, ranks)
    assert sorted(int(i) for i in chain.from_iterable(shares)) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in s) for s in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_a_batch_that_is_large_enough_is_not_stretched() -> None:
    lengths = [50] * 20 + [100] * 20 + [400]
    assert [len(b) for b in cut_micro_batches(lengths, 100_000)] == [41]
    batches = cut_micro_batches(
        lengths, 100_000, stretch=1.15
    )  # 1,000 tokens are enough to close the short ones
    assert [(len(b), lengths[b[0]], lengths[b[-1]]) for b in batches] == [
        (20, 50, 50),
        (20, 100, 100),
        (1, 400, 400),
    ]
    assert [len(b) for b in cut_micro_batches([10, 12, 300], 100_000, stretch=1.15)] == [2, 1]
    assert [len(b) for b in cut_micro_batches([10, 12, 200], 100_000, stretch=1.15)] == [
        3
    ]  # too few tokens to be worth a batch


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 60), st.integers(0, 50), st.integers(0, 3))
def test_packs_keep_order_prompt_budget_and_reach(
    count: int, group: int, budget: int, reach: int, seed: int
) -> None:
    data = sequences(count, seed, group=group)
    packs = packs_of(data, np.arange(count), budget_tokens=budget, reach=reach)
    assert [int(row) for row in chain.from_iterable(packs)] == list(range(count))
    completions = data.lengths - data.prompt_lengths
    for pack, length in zip(packs, pack_lengths(data, packs), strict=True):
        assert (
            len({int(r) // group for r in pack}) == 1
        )  # prompts of one group; random ones of two groups differ
        assert length == data.prompt_lengths[pack[0]] + completions[pack].sum()
        assert len(pack) == 1 or (reach > 0 and length <= budget)
        assert all(
            completions[r] * completions[pack[:i]].sum() <= reach * data.prompt_lengths[r]
            for i, r in enumerate(pack)
        )


def test_long_completions_stay_apart_where_masked_attention_costs_more_than_the_prompt() -> None:
    data = flatten([(np.arange(10, dtype=np.int32), np.zeros(100, np.int32))] * 3)
    assert [len(p) for p in packs_of(data, np.arange(3), budget_tokens=10_000, reach=999)] == [1, 1, 1]
    assert [len(p) for p in packs_of(data, np.arange(3), budget_tokens=10_000, reach=1000)] == [
        2,
        1,
    ]  # 100 x 100 = 1000 x 10
    assert [len(p) for p in packs_of(data, np.arange(3), budget_tokens=10_000, reach=2000)] == [3]


def test_a_pack_by_hand() -> None:
    data = flatten(
        [
            (np.array(p, np.int32), np.array(c, np.int32))
            for p, c in (([5, 6], [7]), ([5, 6], [8, 9]), ([4], [3]))
        ]
    )
    batch = pad_packs(data, [np.array([0, 1]), np.array([2])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 1, 2, 2], [0, 1, -1, -1, -1]]
    assert batch.source.tolist() == [1, 1, 3, 5]
    assert batch.targets.tolist() == [7, 8, 9, 3]
    assert batch.mask.tolist() == [[True, False], [True, True], [True, False]]
    visible = batch.visible()
    assert visible is not None
    assert visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert visible.any(dim=-1).all()  # no position without anything to attend to: softmax would give NaN
    assert pad_packs(data, [np.array([0]), np.array([2])]).visible() is None


def test_ranks_get_whole_packs_of_about_equal_length() -> None:
    data = sequences(64, group=8)
    packs = packs_of(data, np.arange(64), budget_tokens=int(data.lengths.sum()) // 4, reach=96)
    loads = [int(pack_lengths(data, packs)[mine].sum()) for mine in split_ranks(pack_lengths(data, packs), 2)]
    assert max(loads) / min(loads) < 1.15
    assert torch.equal(pad_packs(data, packs).mask.sum(), torch.tensor(data.num_completion_tokens))
