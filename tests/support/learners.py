"""Ranks of the learner on real DeepSpeed, what they train on, and the same steps in plain torch."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorHandleNotFoundError

from frpo.actors.learner import LearnerPool, LearnerWorker
from frpo.actors.transport.store import StoreTransport
from frpo.config import Config, GrpoEstimator, LearnerConfig, ModelConfig, ObjectiveConfig
from frpo.logprobs import LogprobModel
from frpo.objective import Denominators, Surrogate, TokenTerms, policy_loss
from frpo.packing import pad_packs, pad_values
from frpo.types import RolloutBatch
from tests.support import models
from tests.support.builders import weigh

CONFIG: Config = models.config()
ENV = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
OBJECTIVE = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.1, penalty="k3", aggregation="completion")


def spawn(cls: type, pool: Any, ranks: int, restarts: int = 0) -> Any:
    remote: Any = ray.remote(cls)
    options = {"num_cpus": 0.5, "runtime_env": {"env_vars": ENV}, "max_restarts": -1 if restarts else 0}
    handles = [remote.options(**options).remote(rank, ranks, StoreTransport()) for rank in range(ranks)]
    ranks_pool = pool(handles, timeout_s=200, restarts=restarts)
    ranks_pool.join()
    return ranks_pool


def stop(pool: Any) -> None:
    for handle in pool.actors.handles:
        with suppress(ActorHandleNotFoundError):  # it has ended with its Ray
            ray.kill(handle)


class SmallChunks(LearnerWorker):
    """Logits of five positions at a time, as those of a large vocabulary come: ranks differ in their number
    of chunks."""

    def __init__(self, rank: int, world_size: int, transport: StoreTransport) -> None:
        super().__init__(rank, world_size, transport)
        from frpo import logprobs

        logprobs.CHUNK_ELEMENTS, logprobs.CHUNK_POSITIONS = 1, 5


def batch(count: int = 23, seed: int = 0, group: int = 1) -> RolloutBatch:
    """Uneven sequences, `group` to a prompt; behaviour and reference near a uniform policy."""
    data, rng = models.sequences(count, seed, group=group), np.random.default_rng(seed)
    tokens = data.num_completion_tokens
    near = lambda: (-5.25 + 0.1 * rng.normal(size=tokens)).astype(np.float32)  # noqa: E731
    advantages = rng.normal(size=count).astype(np.float32)
    fresh = np.ones(count, bool)
    betas = np.full(count, OBJECTIVE.beta, np.float32)
    return RolloutBatch(data, advantages, near(), None, near(), fresh, betas)


def settings(**fields: Any) -> LearnerConfig:
    return LearnerConfig(
        **{"num_steps": 4, "learning_rate": 1e-2, "grad_clip": 0.5, "weight_decay": 0.1, **fields}
    )


def start(
    pool: LearnerPool,
    policy: Path,
    learner: LearnerConfig,
    model: ModelConfig | None = None,
    objective: ObjectiveConfig = OBJECTIVE,
) -> None:
    pool.start(policy, model or ModelConfig(path=str(policy)), learner, objective, CONFIG.rollout, 5)


def weights(pool: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pool.pack().result().read()}


def digest(pool: Any) -> str:
    return hashlib.sha256(
        b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for _, t in sorted(weights(pool).items()))
    ).hexdigest()


def plain_torch(
    policy: Path, learner: LearnerConfig, steps: int, group: int = 1
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps by hand: one padded batch, every sequence with its own prompt, torch AdamW, torch
    clipping; with learner.sam the gradient of the point uphill, with learner.ema the average at the end."""
    model, _ = models.load_hf(policy)
    model.train()
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": learner.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learner.learning_rate,
    )
    norms = []
    seen: list[dict[str, torch.Tensor]] = []
    for step in range(steps):
        b = batch(seed=step, group=group)
        old = backward(model, b)
        if learner.sam:
            uphill = [p.detach() + learner.sam * p.grad / norm_of(model) for p in model.parameters()]
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            put(model, uphill)
            backward(model, b, old)
            put(model, before)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), learner.grad_clip)))
        optimizer.step()
        optimizer.zero_grad()
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    if learner.ema is None:
        return seen[-1], norms
    shares = [learner.ema ** (steps - 1 - i) for i in range(steps)]
    ends = {}
    for name in seen[-1]:
        ends[name] = sum(share * of[name] for share, of in zip(shares, seen, strict=True)) / sum(shares)
    return ends, norms


def backward(model: Any, b: RolloutBatch, old: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of the loss; `old` are the policy's log-probs where it has moved. Returns the present
    ones."""
    rows = np.arange(len(b.sequences))
    now = LogprobModel(model)(pad_packs(b.sequences, list(rows[:, None])))
    behaviour, reference = (
        pad_values(v, b.sequences, rows, now.mask.shape[1]) for v in (b.behaviour, b.reference)
    )
    own = now.logprobs.detach()
    policy_loss(
        TokenTerms(now.logprobs, own if old is None else old, behaviour, reference, now.mask),
        weigh(torch.from_numpy(b.advantages)),
        Surrogate("token", 0.2, 0.2, "token_truncate", 2.0, "completion"),
        Denominators(num_completions=len(rows), num_tokens=1, max_tokens=1),
    ).loss.backward()
    return own


def norm_of(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()]).norm()


@torch.no_grad()
def put(model: Any, weights: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.copy_(value)


def assert_equal(
    found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    assert set(found) == set(truth)
    for name, tensor in truth.items():
        gap = (found[name] - tensor).norm() / tensor.norm()
        assert gap < tolerance, f"{name}: relative difference {gap:.2e}"
