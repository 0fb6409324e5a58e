"""Fine-tune ranks that keep near the policy they begin from, on real DeepSpeed against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frpo.actors.finetune import FinetunePool, FinetuneWorker
from frpo.config import DatasetConfig, DownstreamSft, FinetuneConfig, LoraConfig, ModelConfig
from frpo.logprobs import LogprobModel
from frpo.packing import pad_packs, pad_values
from frpo.types import Anchor
from tests.support import models
from tests.support.learners import assert_equal, digest, spawn, stop, weights

HELDOUT = (DatasetConfig(path="nowhere.jsonl", task="only"),)


def make_task(**fields: Any) -> DownstreamSft:
    plain = {"name": "s", "data": (), "heldout": HELDOUT, "num_steps": 2, "learning_rate": 1e-2}
    return DownstreamSft(**{**plain, "grad_clip": 0.5, "weight_decay": 0.1, **fields})


def make_anchor(policy: Path, seed: int) -> Anchor:
    """Near the policy, so that the first update has something to pull at too."""
    drawn = models.sequences(11, seed=seed + 20)
    noise = 0.3 * np.random.default_rng(seed).normal(size=drawn.num_completion_tokens)
    start = models.naive_logprobs(models.load_hf(policy)[0], drawn)
    return Anchor(drawn, (start + noise).astype(np.float32))


def plain_steps(policy: Path, spec: DownstreamSft, steps: int) -> tuple[list[Any], list[tuple[float, float]]]:
    """The weights after each step by hand, and loss and KL before it: one padded batch of the examples, one
    of the anchor, torch AdamW, torch clipping."""
    model, _ = models.load_hf(policy)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=spec.learning_rate,
    )
    scorer = LogprobModel(model)
    seen = []
    told = []
    for step in range(steps):
        examples = models.sequences(17, seed=step)
        likely = scorer(pad_packs(examples, list(np.arange(17)[:, None])))
        loss = -likely.logprobs[likely.mask].mean()
        kl = torch.zeros(())
        if spec.kl_to_policy:
            near = make_anchor(policy, step)
            rows = np.arange(11)
            now = scorer(pad_packs(near.sequences, list(rows[:, None])))
            start = pad_values(near.logprobs, near.sequences, rows, now.mask.shape[1])
            log_ratio = (now.logprobs - start)[now.mask].double()
            kl = (log_ratio.exp() - 1 - log_ratio).mean()
        (loss + spec.kl_to_policy * kl).backward()
        told.append((float(loss.detach()), float(kl.detach())))
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return seen, told


def do_steps(ranks: FinetunePool, policy: Path, spec: DownstreamSft, model: ModelConfig | None = None) -> Any:
    ranks.start(policy, model or ModelConfig(path=str(policy)), spec, 1)
    stats = []
    for step in range(spec.num_steps):
        near = make_anchor(policy, step) if spec.kl_to_policy else None
        stats.append(ranks.update(models.sequences(17, seed=step), near))
    return stats


def assert_steps_equal_plain_torch(ranks: FinetunePool, policy: Path, budget: int) -> None:
    spec = make_task(kl_to_policy=0.7, micro_batch_tokens=budget)
    truth, told = plain_steps(policy, spec, 2)
    stats = do_steps(ranks, policy, spec)
    assert_equal(weights(ranks), truth[-1])
    for update, (loss, kl) in zip(stats, told, strict=True):
        assert update.loss == pytest.approx(loss, rel=1e-5)
        assert update.kl == pytest.approx(kl, rel=1e-4)
    assert told[0][1] == pytest.approx(0.3**2 / 2, rel=0.5)


@pytest.mark.parametrize("budget", [60, 100_000])
def test_two_steps_with_an_anchor_equal_plain_torch(
    finetune: FinetunePool, tiny_model: Path, budget: int
) -> None:
    assert_steps_equal_plain_torch(finetune, tiny_model, budget)


def test_two_ranks_share_examples_and_anchor(ray_cluster: None, tiny_model: Path) -> None:
    ranks = spawn(FinetuneWorker, FinetunePool, 2)
    try:
        assert_steps_equal_plain_torch(ranks, tiny_model, 60)
    finally:
        stop(ranks)


def test_an_anchor_of_the_ranks_own_scores_pulls_at_nothing(finetune: FinetunePool, tiny_model: Path) -> None:
    spec = make_task(kl_to_policy=100.0, num_steps=1)
    finetune.start(tiny_model, ModelConfig(path=str(tiny_model)), spec, 1)
    drawn = models.sequences(11, seed=3)
    own = Anchor(drawn, finetune.logprobs(drawn))
    stats = finetune.update(models.sequences(17), own)
    assert stats.kl == pytest.approx(0.0, abs=1e-9)
    pulled = weights(finetune)
    truth, _ = plain_steps(tiny_model, make_task(num_steps=1), 1)
    assert_equal(pulled, truth[0], 1e-3)


def test_a_fine_tune_ends_on_the_average_of_its_weights(finetune: FinetunePool, tiny_model: Path) -> None:
    spec = make_task(ema=0.6, num_steps=3)
    seen, _ = plain_steps(tiny_model, spec, 3)
    do_steps(finetune, tiny_model, spec)
    shares = np.array([0.36, 0.6, 1.0]) / 1.96
    truth = {}
    for name in seen[0]:
        truth[name] = sum(float(share) * of[name] for share, of in zip(shares, seen, strict=True))
    assert_equal(weights(finetune), truth)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)])
def test_between_start_and_end_all_merged_weights_lie_on_the_straight_way(
    finetune: FinetunePool, tiny_model: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    model = ModelConfig(path=str(tiny_model), lora=lora)
    do_steps(finetune, tiny_model, make_task(interpolate=(0.5,)), model)
    start = dict(models.load_hf(tiny_model)[0].named_parameters())
    end = weights(finetune)
    ended = digest(finetune)
    assert_far(start, end)
    for share in (0.25, 0.7):
        finetune.interpolate(share)
        truth = {name: start[name] + share * (end[name] - start[name]) for name in end}
        assert_equal(weights(finetune), truth, 1e-6)
    data = models.sequences(9, seed=8)
    measured = finetune.loss(data)
    finetune.export(tmp_path / "policy", merged=True)
    hf, _ = models.load_hf(tmp_path / "policy")
    assert -float(models.naive_logprobs(hf, data).mean()) == pytest.approx(measured, abs=1e-4)
    finetune.interpolate(0.0)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(finetune).items())
    finetune.interpolate(1.0)
    assert digest(finetune) == ended


def assert_far(start: dict[str, Any], end: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="relative difference"):
        assert_equal(end, start, 1e-2)


def test_the_way_of_an_ema_ends_at_the_average(finetune: FinetunePool, tiny_model: Path) -> None:
    do_steps(finetune, tiny_model, make_task(ema=0.6))
    average = digest(finetune)
    do_steps(finetune, tiny_model, make_task(ema=0.6, interpolate=(0.5,)))
    finetune.interpolate(0.5)
    finetune.interpolate(1.0)
    assert digest(finetune) == average


def test_weights_travel_in_one_order_whatever_has_adapters(finetune: FinetunePool, tiny_model: Path) -> None:
    orders = []
    for lora in (None, LoraConfig(rank=4), LoraConfig(rank=2, targets=("q_proj", "down_proj"))):
        model = ModelConfig(path=str(tiny_model), lora=lora)
        finetune.start(tiny_model, model, FinetuneConfig(num_steps=1), 1)
        orders.append([name for name, _ in finetune.pack().result().read()])
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) > 14
