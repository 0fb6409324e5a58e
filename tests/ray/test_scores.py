"""A policy's log-probs are the same numbers whoever scores it, so that its KL from itself is 0: in bfloat16,
of an adapter and of all weights, in training and saved."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from frpo import saved
from frpo.actors._blocks import sequences_of
from frpo.actors.evaluate import EvaluatePool, EvaluateWorker
from frpo.actors.learner import LearnerPool
from frpo.actors.reference import ReferencePool, ReferenceWorker
from frpo.config import LoraConfig, ModelConfig
from frpo.types import Completion, Group, Prompt
from tests.support import models
from tests.support.learners import ENV, batch, settings, start, stop
from tests.support.policies import lora, write_adapter


def groups(count: int = 7, k: int = 5) -> list[Group]:
    """Of uneven lengths; the engine's log-probs are wrong, and nobody may use them."""
    rng = np.random.default_rng(3)

    def completion() -> Completion:
        tokens = rng.integers(4, 190, rng.integers(1, 9)).astype(np.int32)
        return Completion(tokens, np.full(len(tokens), np.nan, np.float32), 0 * tokens, "", "stop")

    prompts = [
        Prompt(f"p:{i}", "", rng.integers(4, 190, rng.integers(2, 9)).astype(np.int32), "t", {})
        for i in range(count)
    ]
    return [Group(i, prompt, tuple(completion() for _ in range(k))) for i, prompt in enumerate(prompts)]


def flat(answers: list[tuple[Any, ...]]) -> Any:
    return np.concatenate(list(chain.from_iterable(answers)))


@pytest.fixture(scope="module")
def scorers(ray_cluster: None) -> Iterator[tuple[ReferencePool, EvaluatePool]]:
    """Of policies in bfloat16: each call names its own."""

    def one(cls: Any) -> Any:
        return (
            ray.remote(cls)
            .options(num_cpus=0.25, runtime_env={"env_vars": ENV})
            .remote(ModelConfig(path="any", dtype="bfloat16"))
        )

    reference = ReferencePool([one(ReferenceWorker)], timeout_s=200, restarts=0)
    evaluate = EvaluatePool([one(EvaluateWorker), one(EvaluateWorker)], timeout_s=200, restarts=0)
    yield reference, evaluate
    stop(reference)
    stop(evaluate)


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16."""
    return models.in_bfloat16(tiny_model, tmp_path_factory.mktemp("bf16") / "base")


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)], ids=["all weights", "adapter"])
@pytest.mark.parametrize("ranks", ["learner", "two_ranks"])
def test_in_bfloat16_a_policy_is_no_distance_from_itself(
    request: pytest.FixtureRequest,
    scorers: Any,
    base: Path,
    tmp_path: Path,
    lora: LoraConfig | None,
    ranks: str,
) -> None:
    pool: LearnerPool = request.getfixturevalue(ranks)
    (reference, evaluate), drawn = scorers, groups()
    start(
        pool,
        base,
        settings(zero_stage=3 if len(pool.actors) > 1 else 2),
        ModelConfig(path=str(base), dtype="bfloat16", lora=lora),
    )
    reference.use(base, 1.0)
    mine, theirs = [pool.score(g) for g in drawn], [reference.score(g) for g in drawn]
    np.testing.assert_array_equal(flat([m.result() for m in mine]), flat([t.result() for t in theirs]))
    before = flat(pool.submit(drawn).result())
    np.testing.assert_array_equal(before, flat(evaluate.submit(base, drawn).result()))
    for seed in range(3):
        pool.update(batch(seed=seed)).result()
    pool.export(tmp_path / "policy")
    after = flat(pool.submit(drawn).result())
    np.testing.assert_array_equal(after, flat(evaluate.submit(tmp_path / "policy", drawn).result()))
    assert abs(after - before).max() > 0.01
    np.testing.assert_array_equal(before, flat(evaluate.submit(base, drawn).result()))


@pytest.mark.parametrize("ranks", ["learner", "two_ranks"])
def test_an_adapter_is_trained_beside_the_one_that_it_begins_from(
    request: pytest.FixtureRequest, scorers: Any, base: Path, tmp_path: Path, ranks: str
) -> None:
    """An arm's in bfloat16, merged, would be another policy. With the trained one switched off the ranks are
    the reference, also later."""
    pool: LearnerPool = request.getfixturevalue(ranks)
    (reference, evaluate), drawn = scorers, groups()
    arm = write_adapter(
        tmp_path / "arm", base, lora(target_modules=["q_proj", "up_proj"]), dtype=torch.bfloat16
    )
    models.load_hf(base)[1].save_pretrained(arm)
    fields = settings(zero_stage=3 if len(pool.actors) > 1 else 2)
    start(pool, arm, fields, ModelConfig(path=str(base), dtype="bfloat16", lora=LoraConfig(rank=4, alpha=8)))
    reference.use(arm, 1.0)
    pool.beginning.use(arm, 1.0)
    before = flat([later.result() for later in [reference.score(g) for g in drawn]])
    assert abs(before - flat(evaluate.submit(base, drawn).result())).max() > 0.1
    np.testing.assert_array_equal(flat([later.result() for later in [pool.score(g) for g in drawn]]), before)
    for seed in range(3):
        pool.update(batch(seed=seed)).result()
    np.testing.assert_array_equal(
        flat([later.result() for later in [pool.beginning.score(g) for g in drawn]]), before
    )
    pool.save(tmp_path / "checkpoint").result()
    after = flat(pool.submit(drawn).result())
    assert abs(after - before).max() > 0.01
    pool.export(tmp_path / "policy")
    assert saved.plain_rank(tmp_path / "policy") == 8
    assert (
        abs(after - flat(evaluate.submit(tmp_path / "policy", drawn).result())).mean()
        < abs(after - before).mean() / 4
    )
    start(pool, arm, fields, ModelConfig(path=str(base), dtype="bfloat16", lora=LoraConfig(rank=4, alpha=8)))
    pool.load(tmp_path / "checkpoint")
    np.testing.assert_array_equal(flat(pool.submit(drawn).result()), after)


def test_scores_are_those_of_one_sequence_at_a_time(scorers: Any, base: Path) -> None:
    truth = models.naive_logprobs(models.load_hf(base)[0].float(), sequences_of(groups()))
    np.testing.assert_allclose(flat(scorers[1].submit(base, groups()).result()), truth, atol=0.1)
