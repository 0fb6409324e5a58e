"""What a 7B model on GPUs needs and a machine without one can't run: bf16, checkpointing, attention, offload,
sleep, NCCL.

`make test-gpu`. The README says which of these have been run, and where.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from frpo.actors._vllm import vllm_environment
from frpo.actors.learner import LearnerPool, LearnerWorker
from frpo.actors.rollout import RolloutPool, RolloutWorker
from frpo.actors.transport.store import StoreTransport
from frpo.config import ModelConfig
from frpo.metrics import read_steps
from tests.support import models, runs
from tests.support.learners import OBJECTIVE, batch, digest, settings

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def learner(ray_cluster: None) -> Iterator[LearnerPool]:
    remote: Any = ray.remote(LearnerWorker)
    pool = LearnerPool([remote.options(num_cpus=1, num_gpus=1).remote(0, 1, StoreTransport())], timeout_s=300)
    pool.join()
    yield pool
    ray.kill(pool.actors.handles[0])


def start(pool: LearnerPool, policy: Path, model: ModelConfig, **fields: Any) -> None:
    pool.start(policy, model, settings(num_gpus=1, **fields), OBJECTIVE, models.config().rollout, 5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("group", [1, 6])
def test_bf16_follows_float32(
    learner: LearnerPool, tiny_model: Path, attention: str, checkpointing: bool, group: int
) -> None:
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    start(learner, tiny_model, ModelConfig(path=str(tiny_model)))
    exact = learner.update(batch(group=group)).result()
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "attention": attention,
        "gradient_checkpointing": checkpointing,
    }
    start(learner, tiny_model, ModelConfig(path=str(tiny_model), **fields))
    rounded = learner.update(batch(group=group)).result()
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05, abs=0.05)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_deterministic_training_ends_in_the_same_bits(
    learner: LearnerPool, tiny_model: Path, attention: Any
) -> None:
    """The process stays so for the tests after it."""
    ends = []
    for _ in range(2):
        start(
            learner,
            tiny_model,
            ModelConfig(path=str(tiny_model), dtype="bfloat16", attention=attention, deterministic=True),
        )
        for seed in range(4):
            learner.update(batch(seed=seed, group=6)).result()
        ends.append(digest(learner))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("zero_stage", "offload"), [(2, "optimizer"), (3, "all")])
def test_offload_changes_nothing(
    learner: LearnerPool, tiny_model: Path, zero_stage: int, offload: str
) -> None:
    model = ModelConfig(path=str(tiny_model))
    start(learner, tiny_model, model, zero_stage=zero_stage)
    exact = [learner.update(batch(seed=s)).result().loss for s in range(3)]
    start(learner, tiny_model, model, zero_stage=zero_stage, offload=offload)
    assert [learner.update(batch(seed=s)).result().loss for s in range(3)] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_leave_the_gpu_and_come_back(
    learner: LearnerPool, tiny_model: Path, zero_stage: int, dtype: Any
) -> None:
    model = ModelConfig(path=str(tiny_model), dtype=dtype)
    start(learner, tiny_model, model, zero_stage=zero_stage)
    exact = [learner.update(batch(seed=s)).result().loss for s in range(3)]
    start(learner, tiny_model, model, zero_stage=zero_stage)
    losses = []
    for seed in range(3):
        losses.append(learner.update(batch(seed=seed)).result().loss)
        before = digest(learner)
        learner.offload()
        learner.reload()
        assert digest(learner) == before
    assert losses == pytest.approx(exact, rel=1e-5)


def test_sleep_and_wake_keep_the_policy(ray_cluster: None, tiny_model: Path) -> None:
    config = models.config(
        f"model.path={tiny_model}", "rollout.num_gpus=1", "rollout.gpu_memory_utilization=0.3"
    )
    rollout = config.rollout.model_copy(update={"sleep": True})
    remote: Any = ray.remote(RolloutWorker)
    worker = remote.options(num_gpus=1, runtime_env={"env_vars": vllm_environment(config)}).remote(
        str(tiny_model), config.model, rollout, config.num_tokens_limit
    )
    pool = RolloutPool([worker], timeout_s=300, restarts=0, tensor_parallel=1, max_num_seqs=64)
    pool.load_policy(tiny_model, 1)
    data = models.sequences(5)
    before = pool.logprobs(data)
    pool.sleep()
    pool.wake()
    assert abs(pool.logprobs(data) - before).max() < 1e-5
    ray.kill(worker)


SHARED = (
    "rollout.num_gpus=0.5", "rollout.gpu_memory_utilization=0.3", "rollout.sleep=true",
    "learner.zero_stage=3", "learner.num_gpus=0.5",
    "evaluate.num_gpus=0", "reference.num_gpus=0",
)  # fmt: skip


def test_a_run_whose_roles_share_one_gpu(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", *runs.SHORT, *SHARED, *runs.ONE_ARM, timeout_s=800)
    rows = read_steps(tmp_path / "run", "rlhf/frpo")
    assert [r.step for r in rows] == list(range(1, 7))
    assert max(r.update.mismatch_kl for r in rows) < 1e-3


def test_weights_over_nccl(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL between learner and engine needs two GPUs")
    wide = (
        "rollout.num_gpus=1",
        "learner.num_gpus=1",
        "rollout.transport=process_group",
        "rollout.gpu_memory_utilization=0.3",
    )
    runs.run(tmp_path / "run", *runs.SHORT, *wide, *runs.ONE_ARM, timeout_s=800)
    assert max(r.update.mismatch_kl for r in read_steps(tmp_path / "run", "rlhf/frpo")) < 1e-3
