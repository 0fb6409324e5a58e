"""Packs and micro-batches: every sequence once, within the budget, laid out as the mask says."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.batching import flatten
from frpo.packing import cut_micro_batches, pack_lengths, packs_of, pad_packs, pad_values, split_ranks
from frpo.types import Sequences
from tests.support.models import sequences


def laid(*pairs: tuple[list[int], list[int]]) -> Sequences:
    """(prompt, completion) pairs of token ids."""
    return flatten([(np.array(p, np.int32), np.array(c, np.int32)) for p, c in pairs])


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


def test_only_neighbours_with_the_very_same_prompt_share_a_pack() -> None:
    data = laid(([5, 6], [1]), ([5, 6], [2]), ([5, 7], [3]), ([5, 6], [4]), ([5], [6, 8]), ([5, 6], [8]))

    def packs(rows: list[int], reach: float = 100.0, budget_tokens: int = 100) -> list[list[int]]:
        found = packs_of(data, np.array(rows), budget_tokens=budget_tokens, reach=reach)
        return [pack.tolist() for pack in found]

    assert packs([0, 1, 2, 3, 4, 5]) == [[0, 1], [2], [3], [4], [5]]
    assert packs([5, 3, 1]) == [[5, 3, 1]]  # in the order given
    assert packs([0, 1, 3], reach=0) == [[0], [1], [3]]
    nothing = laid(([5], []), ([5], [1]))
    assert len(packs_of(nothing, np.arange(2), budget_tokens=9, reach=0)) == 2
    assert packs([0, 1, 3], reach=0.5) == [[0, 1], [3]]  # 1 x 1 <= 0.5 x 2, but not 1 x 2
    assert packs([0, 1, 3, 5], budget_tokens=4) == [[0, 1], [3, 5]]
    assert packs([0, 1, 3, 5], budget_tokens=5) == [[0, 1, 3], [5]]
    assert packs([0, 1], budget_tokens=1) == [[0], [1]]  # each is longer than that
    assert packs([]) == []


def test_a_new_pack_counts_its_completions_from_its_first() -> None:
    data = laid(*[([5, 6], [1] * 3)] * 5)
    packs = packs_of(data, np.arange(5), budget_tokens=100, reach=9.0)
    # 3 tokens join 3 or 6 while 3 n <= 9 x 2
    assert [pack.tolist() for pack in packs] == [[0, 1, 2], [3, 4]]
    assert pack_lengths(data, packs).tolist() == [11, 8]


def test_micro_batches_go_by_length_and_close_at_the_budget() -> None:
    def batches(lengths: list[int], budget: int, stretch: float = float("inf")) -> list[list[int]]:
        return [batch.tolist() for batch in cut_micro_batches(lengths, budget, stretch=stretch)]

    assert batches([3, 1, 2, 2, 9], 6) == [[1, 2, 3], [0], [4]]
    assert batches([2, 2, 2], 6) == [[0, 1, 2]]
    assert batches([2, 2, 2], 5) == [[0, 1], [2]]
    assert batches([7, 8], 5) == [[0], [1]]  # longer than the budget: alone
    assert batches([], 5) == []
    enough = [128] * 4 + [256]
    assert batches(enough, 10_000, stretch=2.0) == [[0, 1, 2, 3, 4]]
    assert batches(enough, 10_000, stretch=1.99) == [[0, 1, 2, 3], [4]]
    assert batches([128, 128, 256], 10_000, stretch=1.99) == [[0, 1], [2]]  # 2 x 256 are enough
    assert batches([128, 128, 255], 10_000, stretch=1.99) == [[0, 1, 2]]


def test_ranks_are_dealt_the_longest_first_back_and_forth() -> None:
    def shares(lengths: list[int], ranks: int) -> list[list[int]]:
        return [share.tolist() for share in split_ranks(lengths, ranks)]

    assert shares([9, 8, 7, 6], 2) == [[0, 3], [1, 2]]
    assert shares([6, 7, 8, 9], 2) == [[0, 3], [1, 2]]
    assert shares([10, 20, 30, 40, 50, 60, 70], 3) == [[0, 1, 6], [2, 5], [3, 4]]
    assert shares([5, 5, 5, 5, 5], 2) == [[0, 3, 4], [1, 2]]  # of equal ones the earlier comes first
    assert shares([5, 3], 1) == [[0, 1]]
    assert shares([5], 3) == [[0], [], []]


def test_of_equal_lengths_the_earlier_comes_first_however_many_there_are() -> None:
    lengths = [2, 1] * 20
    assert cut_micro_batches(lengths, 1000)[0].tolist() == [*range(1, 40, 2), *range(0, 40, 2)]
    order = np.array([*range(0, 40, 2), *range(1, 40, 2)])  # longest first
    at = np.arange(40) % 4
    first, second = split_ranks(lengths, 2)
    assert first.tolist() == sorted(order[(at == 0) | (at == 3)])
    assert second.tolist() == sorted(order[(at == 1) | (at == 2)])


def test_values_are_padded_with_zeros_behind_their_completions() -> None:
    data = laid(([1, 2, 3], [4]), ([1], [5, 6, 7]), ([1, 2], [8, 9]))
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
    padded = pad_values(values, data, np.array([2, 0, 1]), 4)
    assert padded.dtype == torch.float32
    np.testing.assert_array_equal(
        padded, np.array([[0.5, 0.6, 0, 0], [0.1, 0, 0, 0], [0.2, 0.3, 0.4, 0]], np.float32)
    )


def test_a_pack_may_begin_anywhere_and_hold_many_completions() -> None:
    data = laid(([1], [2]), ([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 11, 12]), ([5, 6, 7], [13]))
    batch = pad_packs(data, [np.array([0]), np.array([3, 1, 2])])
    assert batch.tokens.tolist() == [[1, 2, 0, 0, 0, 0, 0, 0, 0], [5, 6, 7, 13, 8, 9, 10, 11, 12]]
    assert batch.positions is not None
    assert batch.segments is not None
    assert batch.positions.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 3, 4, 3, 4, 5]]
    assert batch.segments.tolist() == [[0, 1, *[-1] * 7], [0, 0, 0, 1, 2, 2, 3, 3, 3]]
    assert batch.source.tolist() == [0, 11, 11, 13, 11, 15, 16]
    assert batch.targets.tolist() == [2, 13, 8, 9, 10, 11, 12]
    assert batch.mask.int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    given = (batch.tokens, batch.positions, batch.segments, batch.source, batch.targets)
    assert {tensor.dtype for tensor in given} == {torch.int64}
    assert batch.mask.dtype == torch.bool


def test_packs_of_one_sequence_need_neither_positions_nor_segments() -> None:
    batch = pad_packs(laid(([1, 2], [3]), ([4], [5, 6])), [np.array([1]), np.array([0])])
    assert batch.tokens.tolist() == [[4, 5, 6], [1, 2, 3]]
    assert (batch.positions, batch.segments, batch.visible()) == (None, None, None)
    assert batch.source.tolist() == [0, 1, 4]


def test_an_empty_completion_is_predicted_by_nothing() -> None:
    batch = pad_packs(laid(([1, 2], []), ([1, 2], [3])), [np.array([0, 1])])
    assert batch.source.tolist() == [1]
    assert batch.targets.tolist() == [3]
    assert batch.mask.tolist() == [[False], [True]]


@pytest.mark.long
def test_the_blocks_of_flex_attention_are_the_mask_itself() -> None:
    batch = pad_packs(laid(([5, 6], [7]), ([5, 6], [8, 9]), ([4], [3])), [np.array([0, 1]), np.array([2])])
    blocks, visible = batch.blocks(), batch.visible()
    assert visible is not None
    assert blocks.shape == (2, 1, 5, 5)
    at = torch.meshgrid(*(torch.arange(size) for size in blocks.shape), indexing="ij")
    assert torch.equal(blocks.mask_mod(*at), visible)


@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_a_batch_goes_to_the_device_that_was_asked_for(rows: list[int]) -> None:
    batch = pad_packs(laid(([1], [2]), ([1], [3])), [np.array(rows)], "meta")
    tensors = [batch.tokens, batch.positions, batch.segments, batch.source, batch.targets, batch.mask]
    assert {str(tensor.device) for tensor in tensors if tensor is not None} == {"meta"}
