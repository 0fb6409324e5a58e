"""What a rank of a fine-tune descends and tells of an update, by hand: the worker around a policy of one row
of logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from frpo.actors.finetune import FinetuneWorker
from frpo.batching import flatten
from frpo.config import BaseConfig, DownstreamSft, FinetuneConfig
from frpo.stats import FinetuneStats
from frpo.types import Anchor

LOGITS = (0.3, -0.2, 0.9, 0.0, -1.1)
EXAMPLES = (([4], [0, 1]), ([4, 4], [2]), ([4], [2, 3, 2]))
DRAWN = (([1], [2, 2]), ([0, 1, 2], [3]))
START = (-0.5, -2.5, -1.0)
"""Log-probs of what was drawn, token by token."""


class LogitsEngine:
    """The next token depends on nothing that stands before it. `together`: a micro-batch of all sequences,
    else each alone."""

    device = "cpu"

    def __init__(self, together: bool) -> None:
        self.together = together
        self.logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)

    def share(self, sequences: Any) -> list[Any]:
        packs = [np.array([row]) for row in range(len(sequences))]
        return [packs] if self.together else [[pack] for pack in packs]

    def forward(self, batch: Any) -> Any:
        values = self.logits.log_softmax(0)[batch.targets]
        empty = torch.zeros(batch.mask.shape, dtype=torch.float64)
        return SimpleNamespace(logprobs=empty.masked_scatter(batch.mask, values), mask=batch.mask)

    def step(self, share: list[Any], loss: Any) -> tuple[Any, list[Any]]:
        told = []
        for packs in share:
            value, of_packs = loss(packs)
            value.backward()
            told.append(of_packs)
        return SimpleNamespace(grad_norm=7.0, learning_rate=0.01), told

    def reduce(self, values: Any) -> list[float]:
        return list(values)


def flatten_rows(rows: Any) -> Any:
    return flatten([(np.array(p, np.int32), np.array(c, np.int32)) for p, c in rows])


def update(
    settings: FinetuneConfig, together: bool = True, anchored: bool = True
) -> tuple[FinetuneStats, np.ndarray]:
    """What is told, and the gradient."""
    worker: Any = FinetuneWorker.__new__(FinetuneWorker)
    engine = LogitsEngine(together)
    worker.finetune, worker._engine = settings, lambda: engine
    anchor = Anchor(flatten_rows(DRAWN), np.array(START, np.float32)) if anchored else None
    stats = worker.update(flatten_rows(EXAMPLES), anchor)
    assert engine.logits.grad is not None
    return stats, engine.logits.grad.numpy()


def make_task(**fields: Any) -> DownstreamSft:
    return DownstreamSft(name="s", data=(), num_steps=1, kl_to_policy=0.7, **fields)


LIKELY = np.exp(LOGITS) / np.exp(LOGITS).sum()
RATIO = [float(np.log(LIKELY[token])) - start for token, start in zip((2, 2, 3), START, strict=True)]
"""log policy - log start of what was drawn."""


def slope_of(tokens: Any, weights: Any) -> np.ndarray:
    """Of the weighted sum of log-probs: d log softmax_t / d logits = one-hot_t - softmax."""
    total = np.zeros(5)
    for token, weight in zip(tokens, weights, strict=True):
        total += weight * (np.eye(5)[token] - LIKELY)
    return total


@pytest.mark.parametrize("together", [True, False])
def test_the_loss_is_that_of_the_examples_and_the_weighted_kl_of_the_anchor(together: bool) -> None:
    stats, gradient = update(make_task(), together)
    trained = (0, 1, 2, 2, 3, 2)
    assert stats.loss == pytest.approx(-np.log(LIKELY[list(trained)]).mean())
    assert stats.kl == pytest.approx(np.mean([np.exp(gap) - 1 - gap for gap in RATIO]), rel=1e-6)
    assert stats.num_tokens == 3 + 3 + 4 + 3 + 4
    kl_slope = slope_of((2, 2, 3), [(np.exp(gap) - 1) / 3 for gap in RATIO])
    np.testing.assert_allclose(gradient, slope_of(trained, [-1 / 6] * 6) + 0.7 * kl_slope, rtol=1e-6)


def test_prompts_are_trained_on_where_asked_and_those_of_the_anchor_never() -> None:
    stats, _ = update(make_task(full_sequence=True))
    assert stats.loss == pytest.approx(-np.log(LIKELY[[0, 1, 4, 2, 2, 3, 2]]).mean())
    assert stats.kl == pytest.approx(np.mean([np.exp(gap) - 1 - gap for gap in RATIO]), rel=1e-6)


@pytest.mark.parametrize(
    "settings", [BaseConfig(data=(), num_steps=1), DownstreamSft(name="s", data=(), num_steps=1)]
)
def test_without_an_anchor_there_is_nothing_but_the_examples(settings: FinetuneConfig) -> None:
    stats, gradient = update(settings, anchored=False)
    assert stats.kl is None
    assert stats.num_tokens == 3 + 3 + 4
    assert (stats.grad_norm, stats.learning_rate) == (7.0, 0.01)
    np.testing.assert_allclose(gradient, slope_of((0, 1, 2, 2, 3, 2), [-1 / 6] * 6))
