"""Adapters that travel alone: a learner's and saved ones, applied unmerged by real vLLM, against peft and
against merged weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from frpo.actors._blocks import sequences_of
from frpo.actors.learner import LearnerPool, LearnerWorker
from frpo.actors.rollout import RolloutPool
from frpo.actors.transport import Transport
from frpo.actors.transport.adapter import AdapterTransport
from frpo.actors.transport.store import StoreTransport, put_tensors
from frpo.config import LoraConfig, ModelConfig
from tests.support import models
from tests.support.engines import completions_of, draw, draw_over_a_publish, engine, largest_gap
from tests.support.learners import ENV, OBJECTIVE, batch, settings
from tests.support.policies import lora, write_adapter

LORA = LoraConfig(rank=4, alpha=8)


def rank(model: ModelConfig, transport: Transport, **fields: Any) -> LearnerPool:
    remote: Any = ray.remote(LearnerWorker)
    pool = LearnerPool(
        [remote.options(num_cpus=0.5, runtime_env={"env_vars": ENV}).remote(0, 1, transport)], timeout_s=200
    )
    pool.join()
    pool.start(Path(model.path), model, settings(**fields), OBJECTIVE, models.config().rollout, 5)
    return pool


def stop(*pools: Any) -> None:
    for pool in pools:
        ray.kill(pool.actors.handles[0])


@pytest.fixture(scope="module")
def pool(ray_cluster: None, tiny_model: Path) -> Iterator[RolloutPool]:
    found = engine(ModelConfig(path=str(tiny_model), lora=LORA))
    yield found
    stop(found)


def test_an_adapter_takes_the_place_of_the_last_under_completions_that_go_on(
    pool: RolloutPool, tiny_model: Path
) -> None:
    model = ModelConfig(path=str(tiny_model), lora=LORA)
    old, new = rank(model, AdapterTransport()), rank(model, AdapterTransport())
    for seed in range(3):
        new.update(batch(seed=seed)).result()
    parcel = new.pack().result()
    prompts = models.prompts(models.load_hf(tiny_model)[1], 28)
    pool.deliver(old.pack().result(), 1)
    drawn = draw_over_a_publish(pool, prompts[:24], prompts[24:], parcel)
    own = np.concatenate([completion.logprobs for completion in completions_of(drawn)])
    versions = np.concatenate([completion.versions for completion in completions_of(drawn)])
    before = old.logprobs(sequences_of(drawn))
    np.testing.assert_allclose(own[versions == 1], before[versions == 1], atol=1e-4)
    assert (1, 2) in {tuple(np.unique(completion.versions).tolist()) for completion in completions_of(drawn)}
    fresh = [group for group in drawn if group.policy_version == 2]
    assert {group.index for group in fresh} >= {24, 25, 26, 27}
    own = np.concatenate([completion.logprobs for completion in completions_of(fresh)])
    np.testing.assert_allclose(own, new.logprobs(sequences_of(fresh)), atol=1e-4)
    assert abs(own - old.logprobs(sequences_of(fresh))).max() > 0.01
    stop(old, new)


def by_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(model_of(base), adapter).eval()


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_what_is_published_is_the_learners_policy_also_after_a_kill(
    pool: RolloutPool, tiny_model: Path
) -> None:
    learner = rank(ModelConfig(path=str(tiny_model), lora=LORA), AdapterTransport())
    data = models.sequences(12)
    before = learner.logprobs(data)
    for version in range(3):
        parcel = learner.pack().result()
        pool.deliver(parcel, version)
        np.testing.assert_allclose(pool.logprobs(data)[0], learner.logprobs(data), atol=1e-5)
        learner.update(batch(seed=version)).result()
    assert parcel.num_bytes == 4 * 4 * sum(a + b for a, b in projections(tiny_model))  # float32, rank 4
    assert abs(pool.logprobs(data)[0] - before).max() > 0.05
    now = pool.logprobs(data)
    (process,) = pool.members()
    os.kill(process.pid, signal.SIGKILL)
    np.testing.assert_allclose(pool.logprobs(data), now, atol=1e-6)
    stop(learner)


def projections(folder: Path) -> list[tuple[int, int]]:
    """Outputs and inputs of every linear layer that gets an adapter."""
    named = models.load_hf(folder)[0].named_parameters()
    return [tuple(p.shape) for name, p in named if p.ndim == 2 and "_proj" in name]


def test_saved_adapters_stand_on_the_weights_that_they_name(
    pool: RolloutPool, tiny_model: Path, tmp_path: Path
) -> None:
    """Of the engine's own base, of another one, of a kind that is merged, and none at all: each after the
    other."""
    data, tokenizer = models.sequences(12, seed=3), models.load_hf(tiny_model)[1]
    other = tmp_path / "other"
    models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed=1).save_pretrained(other)
    plain = write_adapter(
        tmp_path / "plain", tiny_model, lora(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 64})
    )
    elsewhere = write_adapter(tmp_path / "elsewhere", other, lora())
    dora = write_adapter(tmp_path / "dora", tiny_model, lora(use_dora=True))
    for version, (base, adapter) in enumerate(
        ((tiny_model, plain), (other, elsewhere), (tiny_model, dora), (tiny_model, plain))
    ):
        pool.load_policy(adapter, version)
        truth = by_peft(base, adapter)
        np.testing.assert_allclose(pool.logprobs(data)[0], models.naive_logprobs(truth, data), atol=1e-4)
        assert max(largest_gap(truth, pool, draw(pool, models.prompts(tokenizer, 4), version))) < 1e-4
    pool.load_policy(other, 7)
    np.testing.assert_allclose(
        pool.logprobs(data)[0], models.naive_logprobs(model_of(other), data), atol=1e-4
    )
    model = models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed=2)
    pool.deliver(put_tensors(model.named_parameters()), 8)
    np.testing.assert_allclose(pool.logprobs(data)[0], models.naive_logprobs(model, data), atol=1e-4)
    pool.load_policy(plain, 9)
    np.testing.assert_allclose(
        pool.logprobs(data)[0], models.naive_logprobs(by_peft(tiny_model, plain), data), atol=1e-4
    )


def test_an_adapter_and_the_one_that_it_began_from_arrive_as_one(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """A fine-tune of an arm, both with adapters, in bfloat16."""
    base, tokenizer = models.in_bfloat16(tiny_model, tmp_path / "base"), models.load_hf(tiny_model)[1]
    arm = write_adapter(
        tmp_path / "arm", base, lora(target_modules=["q_proj", "up_proj"]), dtype=torch.bfloat16
    )
    tokenizer.save_pretrained(arm)
    model = ModelConfig(path=str(base), lora=LORA, dtype="bfloat16")
    receiver, learner = engine(model), rank(model, AdapterTransport())
    learner.start(arm, model, settings(), OBJECTIVE, models.config().rollout, 5)
    trained = batch(count=60)
    before = learner.logprobs(trained.sequences)
    for _ in range(3):
        learner.update(trained).result()
    receiver.deliver(learner.pack().result(), 1)
    now, there = learner.logprobs(trained.sequences), receiver.logprobs(trained.sequences)[0]
    learner.export(tmp_path / "policy")
    receiver.load_policy(tmp_path / "policy", 2)
    saved_one = receiver.logprobs(trained.sequences)[0]
    stop(learner, receiver)
    assert abs(there - now).mean() < abs(now - before).mean() / 10
    np.testing.assert_array_equal(saved_one, there)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_bfloat16_an_adapter_arrives_whole_and_merged_weights_do_not(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """Merged weights keep only a part of what the first updates change; an adapter arrives as it is, and
    engine and learner stay as near as two implementations of the base are. (Log-probs alone do not tell them
    apart here: bfloat16 activations of so small a model round early updates away in either.)"""
    base = models.in_bfloat16(tiny_model, tmp_path / "base")
    model = ModelConfig(path=str(base), lora=LoraConfig(rank=16, alpha=16), dtype="bfloat16")
    trained, receiver = batch(count=60), engine(model)
    whole, sender = (
        rank(model, transport, learning_rate=3e-5, num_steps=20)
        for transport in (StoreTransport(), AdapterTransport())
    )
    first = {name: tensor.float() for name, tensor in whole.pack().result().read()}
    gaps, kept = [], []
    for update in range(21):
        if update in (0, 1, 5, 20):
            parcel: Any = sender.pack().result()
            receiver.deliver(parcel, update)
            gaps.append(
                float(
                    abs(receiver.logprobs(trained.sequences)[0] - sender.logprobs(trained.sequences)).mean()
                )
            )
            changes = changes_of(dict(parcel.tensors.read()), scale=1.0)
            found = {
                name: tensor.float() - first[name]
                for name, tensor in whole.pack().result().read()
                if name in changes
            }
            kept.append([float((found[n] * c).sum() / (c * c).sum()) for n, c in changes.items() if c.any()])
        for pool in (whole, sender):
            pool.update(trained).result()
    stop(whole, sender, receiver)
    shares = [float(np.mean(k)) for k in kept[1:]]
    print({"gaps": gaps, "kept by merged weights after 1, 5, 20": shares})
    assert max(gaps[1:]) < 1.5 * gaps[0]
    assert shares == sorted(shares)
    assert shares[0] < 0.5


def changes_of(adapter: dict[str, Any], scale: float) -> dict[str, Any]:
    """What the tensors of an adapter add to the weights, float32, by the weights' names."""
    pairs = {name.partition(".lora_A")[0]: name for name in adapter if ".lora_A" in name}
    return {
        stem.removeprefix("base_model.model.") + ".weight": scale
        * (adapter[name.replace("lora_A", "lora_B")].float() @ adapter[name].float())
        for stem, name in pairs.items()
    }
