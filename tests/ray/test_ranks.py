"""Two ranks on real DeepSpeed against plain torch: shared prompts, uneven shares. And a rank that dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from frpo.actors.learner import LearnerPool
from frpo.roles import RankDied, WorkerFailed
from tests.support import models
from tests.support.learners import assert_equal, batch, plain_torch, settings, start, weights


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_completions_that_share_a_prompt_equal_plain_torch(
    two_ranks: LearnerPool, tiny_model: Path, zero_stage: int
) -> None:
    truth, norms = plain_torch(tiny_model, settings(), 2, group=6)
    for budget in (60, 100_000):
        start(two_ranks, tiny_model, settings(zero_stage=zero_stage, micro_batch_tokens=budget))
        stats = [two_ranks.update(batch(seed=s, group=6)).result() for s in range(2)]
        assert [s.grad_norm for s in stats] == pytest.approx(norms, rel=1e-4)
        assert_equal(weights(two_ranks), truth)
    sequences = batch(group=6).sequences
    assert stats[0].num_computed_tokens < 0.7 * sequences.lengths.sum()
    found = two_ranks.logprobs(sequences)
    start(two_ranks, tiny_model, settings(zero_stage=zero_stage))
    [two_ranks.update(batch(seed=s, group=6)).result() for s in range(2)]
    np.testing.assert_array_equal(two_ranks.logprobs(sequences), found)


@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_with_uneven_shares_equal_plain_torch(
    two_ranks: LearnerPool, tiny_model: Path, zero_stage: int
) -> None:
    truth, norms = plain_torch(tiny_model, settings(), 2)
    start(two_ranks, tiny_model, settings(zero_stage=zero_stage, micro_batch_tokens=60))
    stats = [two_ranks.update(batch(seed=s)).result() for s in range(2)]
    assert [s.grad_norm for s in stats] == pytest.approx(norms, rel=1e-4)
    assert_equal(weights(two_ranks), truth)
    assert stats[0].num_computed_tokens == int(batch().sequences.lengths.sum())
    start(two_ranks, tiny_model, settings(zero_stage=zero_stage, micro_batch_tokens=60))
    for count in (23, 2, 1):  # each rank its share; none has one at last
        data = models.sequences(count, seed=4)
        naive = models.naive_logprobs(models.load_hf(tiny_model)[0], data)
        np.testing.assert_allclose(two_ranks.logprobs(data), naive, atol=1e-5)


def test_a_dead_rank_is_named_and_its_job_begins_anew(two_ranks: LearnerPool, tiny_model: Path) -> None:
    """Of two ranks the other waits in a collective, and is given up within seconds."""
    start(two_ranks, tiny_model, settings())
    first = [two_ranks.update(batch(seed=seed)).result() for seed in range(2)]
    state = weights(two_ranks)
    began = time.monotonic()
    os.kill(two_ranks.processes[1].pid, signal.SIGKILL)
    with pytest.raises(RankDied, match=r"learner worker 1 died during update\(\)") as error:
        two_ranks.update(batch()).result()
    assert time.monotonic() - began < 10
    assert error.value.job == "learner"
    before = set(two_ranks.processes)
    two_ranks.revive()
    assert before.isdisjoint(two_ranks.processes)
    start(two_ranks, tiny_model, settings())
    again = [two_ranks.update(batch(seed=seed)).result() for seed in range(2)]
    assert [s.loss for s in again] == [s.loss for s in first]
    assert_equal(weights(two_ranks), state, tolerance=1e-12)
    with pytest.raises(WorkerFailed, match=r"may not be started anew again \(cluster.max_restarts = 1\)"):
        two_ranks.revive()
