"""What a rank of the learner tells of a step, by hand: the worker around an engine of known log-probs."""

from __future__ import annotations

import itertools
import math
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from frpo.actors.learner import LearnerWorker
from frpo.batching import flatten
from frpo.config import LearnerConfig, ObjectiveConfig, RolloutConfig
from frpo.stats import UpdateStats
from frpo.types import RolloutBatch

TOKENS = ([10], [20, 30], [40, 50, 60])
"""Of three completions, behind prompts of 1, 2 and 3 tokens."""
LENGTHS = [len(tokens) for tokens in TOKENS]
ADVANTAGES = (1.0, -2.0, 0.5)


class FakeEngine:
    """The log-prob of token t is -t / 10, its entropy t / 100; every sequence is a micro-batch of its own."""

    device = "cpu"

    def __init__(self) -> None:
        self.temperatures: list[float] = []
        self.updates: list[list[int]] = []

    def share(self, sequences: Any, rows: np.ndarray) -> list[Any]:
        self.updates.append(rows.tolist())
        return [[np.array([row])] for row in rows]

    def forward(self, batch: Any, temperature: float) -> Any:
        self.temperatures.append(temperature)
        tokens = torch.zeros(batch.mask.shape).masked_scatter(batch.mask, batch.targets.float())
        return SimpleNamespace(logprobs=-tokens / 10, entropy=tokens / 100, mask=batch.mask)

    def step(self, share: list[Any], loss: Any) -> tuple[Any, list[Any]]:
        told = [loss(packs)[1] for packs in share]
        count = len(self.updates)
        return SimpleNamespace(grad_norm=7.0 + count, learning_rate=0.01 * count), told

    def reduce(self, values: Any) -> list[float]:
        return list(values)


def flat(of_token: Any) -> np.ndarray:
    return np.array([of_token(token) for token in itertools.chain(*TOKENS)], np.float32)


def update(
    objective: dict[str, Any],
    *,
    updates: int = 1,
    old: Any = None,
    reference: Any = None,
    gap: float = 0.2,
    staleness: tuple[int, ...] = (0,) * 6,
    fresh: tuple[bool, ...] = (True, True, True),
) -> tuple[UpdateStats, FakeEngine]:
    """`old` and `reference` are what they give more than the policy to each token; the engine of the rollouts
    gives `gap` more, and a token that is s versions old s + 1 times as much; completions in `fresh` are of
    groups that the policy drew itself."""
    prompts = [np.full(i + 1, 99, np.int32) for i in range(3)]
    sequences = flatten([(p, np.array(t, np.int32)) for p, t in zip(prompts, TOKENS, strict=True)])

    def policy_and(more: Any) -> np.ndarray | None:
        return None if more is None else flat(lambda t: -t / 10) + np.float32(more)

    ages = np.array(staleness, np.int32)
    behaviour = flat(lambda t: -t / 10) + np.float32(gap) * (ages + 1).astype(np.float32)
    batch = RolloutBatch(
        sequences,
        np.array(ADVANTAGES, np.float32),
        behaviour,
        policy_and(old),
        policy_and(reference),
        fresh=np.array(fresh),
        betas=np.full(3, 0.25, np.float32),
    )
    worker = LearnerWorker.__new__(LearnerWorker)
    engine = FakeEngine()
    worker.engine, worker.joined = engine, True  # type: ignore[assignment]
    worker.objective = ObjectiveConfig.model_validate(
        {"penalty": "k3", "clip_low": 0.2, "clip_high": 0.4, **objective}
    )
    worker.learner = LearnerConfig(num_steps=9, updates_per_batch=updates)
    worker.rollout = RolloutConfig(max_new_tokens=5, temperature=0.7)
    return worker.update(batch), engine


def k3(d: float) -> float:
    return math.exp(d) - d - 1


@pytest.mark.parametrize(
    ("aggregation", "share"),
    [
        ("completion", lambda length: 1 / 3),
        ("token", lambda length: length / 6),
        ("sum", lambda length: length / (3 * 5)),
    ],
)
def test_the_loss_and_the_figures_beside_it(aggregation: str, share: Any) -> None:
    stats, engine = update({"aggregation": aggregation}, reference=-0.3)
    per_token = [-a * math.exp(-0.2) + 0.25 * k3(-0.3) for a in ADVANTAGES]
    assert stats.loss == pytest.approx(
        sum(value * share(length) for value, length in zip(per_token, LENGTHS, strict=True)), rel=1e-5
    )
    assert stats.penalty == pytest.approx(k3(-0.3), rel=1e-4)
    assert stats.entropy == pytest.approx(mean([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert stats.mismatch_kl == pytest.approx(k3(-0.2), rel=1e-4)
    assert stats.kl == pytest.approx(0.3 * 6 / 3, rel=1e-5)  # per completion
    assert (stats.grad_norm, stats.learning_rate, stats.clip_share) == (8.0, 0.01, 0.0)
    assert stats.num_computed_tokens == 12  # prompts and completions
    assert engine.temperatures == [0.7] * 3


def test_without_a_reference_there_is_neither_penalty_nor_kl() -> None:
    stats, _ = update({"aggregation": "token"})
    assert (stats.penalty, stats.kl) == (0.0, None)
    weighted = sum(a * length for a, length in zip(ADVANTAGES, LENGTHS, strict=True))
    assert stats.loss == pytest.approx(-math.exp(-0.2) * weighted / 6, rel=1e-5)


def test_under_the_reverse_penalty_the_kl_is_told_and_not_descended() -> None:
    stats, _ = update({"aggregation": "token", "penalty": "reverse"}, old=0.0, reference=-0.3)
    assert stats.penalty == 0.0
    assert stats.kl == pytest.approx(0.6, rel=1e-5)
    assert stats.loss == pytest.approx(update({"aggregation": "token"})[0].loss)


@pytest.mark.parametrize(("ratio", "limit"), [(1.5, 1.4), (0.5, 0.8)])
def test_a_ratio_is_clipped_above_by_clip_high_and_below_by_clip_low(ratio: float, limit: float) -> None:
    """All advantages together: those that the ratio has moved the way of their sign are clipped."""
    objective = {"aggregation": "token", "importance_cap": 100.0}
    stats, engine = update(objective, updates=3, old=-math.log(ratio), gap=-math.log(ratio))
    clips = [(a > 0) == (ratio > 1) for a in ADVANTAGES]
    terms = [-a * (limit if is_clipped else ratio) for a, is_clipped in zip(ADVANTAGES, clips, strict=True)]
    assert stats.loss == pytest.approx(mean(terms), rel=1e-5)  # the mean over updates
    clipped = [length for length, is_clipped in zip(LENGTHS, clips, strict=True) if is_clipped]
    assert stats.clip_share == pytest.approx(sum(clipped) / 6)
    assert engine.updates == [[0], [1], [2]]
    assert (stats.grad_norm, stats.learning_rate) == (10.0, 0.03)  # of the last


def test_the_first_update_of_one_has_ratio_one_whatever_was_scored_before() -> None:
    stats, _ = update({"aggregation": "token"}, old=-0.5)
    assert stats.loss == pytest.approx(update({"aggregation": "token"})[0].loss)
    assert stats.clip_share == 0.0


def test_a_large_importance_weight_is_cut_at_the_cap() -> None:
    stats, _ = update({"aggregation": "token", "importance_cap": 2.0}, gap=-3.0)
    weighted = sum(a * length for a, length in zip(ADVANTAGES, LENGTHS, strict=True))
    assert stats.loss == pytest.approx(-2.0 * weighted / 6, rel=1e-5)
    assert stats.mismatch_kl == pytest.approx(k3(3.0), rel=1e-4)
    assert stats.capped_share == 1.0


def test_the_mismatch_is_of_fresh_completions_and_what_older_versions_began_stands_apart() -> None:
    """Also the tokens that the learner's version added to what an older one had begun: it drew them after
    that one's keys and values."""
    stats, _ = update(
        {"aggregation": "token"}, gap=-0.4, staleness=(0, 1, 0, 2, 1, 0), fresh=(True, False, False)
    )
    assert stats.mismatch_kl == pytest.approx(k3(0.4), rel=1e-4)
    stale = mean(k3(gap) for gap in (0.8, 0.4, 1.2, 0.8, 0.4))
    assert stats.stale_kl == pytest.approx(stale, rel=1e-4)
    # weights exp(0.8) and exp(1.2) are above the cap of 2
    weights = [math.exp(0.4), 2.0, math.exp(0.4), 2.0, 2.0, math.exp(0.4)]
    advantages = np.repeat(ADVANTAGES, LENGTHS)
    assert stats.loss == pytest.approx(-float((advantages * weights).mean()), rel=1e-5)
    assert stats.capped_share == pytest.approx(3 / 6)


def test_a_batch_of_one_kind_of_token_tells_nothing_of_the_other() -> None:
    fresh, _ = update({})
    stale, _ = update({}, staleness=(1,) * 6, fresh=(False, False, False))
    assert (fresh.stale_kl, stale.mismatch_kl) == (None, None)
    assert fresh.mismatch_kl is not None
    assert stale.stale_kl is not None
