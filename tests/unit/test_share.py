"""How a batch is dealt to the ranks of a job: every row once, and as many passes for each."""

from __future__ import annotations

import numpy as np

from frpo.actors._share import Job, Share, deal_to_rank
from frpo.types import Sequences


def sequences(*lengths: int) -> Sequences:
    """Of prompts that differ, two tokens long."""
    tokens = np.concatenate([np.full(length, i, dtype=np.int32) for i, length in enumerate(lengths)])
    return Sequences(tokens, np.full(len(lengths), 2, dtype=np.int32), np.array(lengths, dtype=np.int32))


def rows_of(share: Share) -> list[list[list[int]]]:
    return [[pack.tolist() for pack in packs] for packs in share.micro_batches]


def test_a_rank_with_less_to_do_is_told_how_often_others_go_on() -> None:
    data, rows = sequences(4, 4, 4), np.arange(3)
    first, second = (deal_to_rank(data, rows, Job(rank, 2, budget_tokens=4, reach=0)) for rank in range(2))
    assert rows_of(first) == [[[0]]]
    assert (first.num_idle, [pack.tolist() for pack in first.idle]) == (1, [[0]])
    assert rows_of(second) == [[[1]], [[2]]]
    assert second.num_idle == 0


def test_one_rank_takes_the_chosen_rows_in_as_many_tokens_as_fit() -> None:
    share = deal_to_rank(sequences(4, 6, 4, 8), np.array([0, 2, 3]), Job(0, 1, budget_tokens=8, reach=0))
    assert rows_of(share) == [[[0], [2]], [[3]]]
    assert share.num_idle == 0


def test_completions_of_one_prompt_are_dealt_to_both_ranks() -> None:
    """One pack would hold all four, and leave the other rank nothing but idle passes."""
    tokens = np.tile(np.array([7, 7, 1], dtype=np.int32), 4)
    data = Sequences(tokens, np.full(4, 2, dtype=np.int32), np.full(4, 3, dtype=np.int32))
    alone = deal_to_rank(data, np.arange(4), Job(0, 1, budget_tokens=100, reach=1000))
    assert rows_of(alone) == [[[0, 1, 2, 3]]]
    shares = [
        deal_to_rank(data, np.arange(4), Job(rank, 2, budget_tokens=100, reach=1000)) for rank in range(2)
    ]
    assert [share.num_idle for share in shares] == [0, 0]
    assert [rows_of(share) for share in shares] == [[[[0], [3]]], [[[1], [2]]]]
