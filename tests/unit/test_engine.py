"""What the engine tells its optimiser and takes from it, without DeepSpeed."""

from __future__ import annotations

import math

import pytest
import torch

from frpo.actors._engine import norm_of
from frpo.actors._optimizer import adamw_of, decay_groups
from frpo.config import LearnerConfig


def parameters() -> list[torch.nn.Parameter]:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    return list(model.parameters())


def test_norms_and_biases_do_not_decay() -> None:
    decayed, plain = decay_groups(parameters(), 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (4, 4)]
    assert [tuple(p.shape) for p in plain["params"]] == [(4,)] * 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    mine = parameters()
    before = [p.detach().clone() for p in mine]
    optimizer = adamw_of(mine, LearnerConfig(num_steps=1, learning_rate=0.5, weight_decay=0.1))
    for p in mine:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(mine, before, strict=True):
        torch.testing.assert_close(p.detach(), old * (0.95 if p.ndim > 1 else 1.0))


def test_no_group_is_empty_and_without_decay_there_is_one() -> None:
    matrices = [p for p in parameters() if p.ndim > 1]
    assert len(decay_groups(matrices, 0.1)) == 1
    assert [len(g["params"]) for g in decay_groups(parameters(), 0.0)] == [5]


@pytest.mark.parametrize(
    "mark", [None, -1, -1.0, math.inf, math.nan, torch.tensor(-1.0), torch.tensor(math.inf)]
)
def test_deepspeeds_marks_of_a_gradient_that_is_none(mark: float | torch.Tensor | None) -> None:
    assert math.isnan(norm_of(mark))


def test_a_norm_is_a_norm() -> None:
    assert norm_of(torch.tensor(2.5)) == 2.5
    assert norm_of(0.0) == 0.0
