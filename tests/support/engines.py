"""Rollout workers on real vLLM, what they draw, and how far their log-probs are from transformers'."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import ray

from frpo.actors._blocks import sequences_of
from frpo.actors._vllm import vllm_environment
from frpo.actors.rollout import RolloutPool, RolloutWorker
from frpo.config import ModelConfig
from frpo.seeds import derive
from frpo.types import Completion, Group, Prompt, Sampling, Ticket
from tests.support import models

RESTARTS = 8
"""As often as tests kill an engine that they share."""
SAMPLING = Sampling(num_completions=4, max_new_tokens=7)


def engine(model: ModelConfig) -> RolloutPool:
    config = models.config(f"model.path={model.path}")
    options = {"num_cpus": 1, "max_restarts": RESTARTS, "runtime_env": {"env_vars": vllm_environment(config)}}
    worker = (
        ray.remote(RolloutWorker)
        .options(**options)
        .remote(model.path, model, config.rollout, config.num_tokens_limit)
    )
    pool = RolloutPool([worker], timeout_s=200, restarts=RESTARTS, tensor_parallel=1, max_num_seqs=64)
    pool.actors.wait_until_ready(300)
    return pool


def draw(pool: RolloutPool, prompts: list[Prompt], version: int, seed: int = 0) -> list[Group]:
    seeds = [derive(seed, i) for i in range(len(prompts))]
    return sorted(pool.generate(prompts, seeds, SAMPLING, version), key=lambda g: g.index)


def draw_over_a_publish(
    pool: RolloutPool, before: list[Prompt], after: list[Prompt], parcel: Any, *, in_flight: bool = True
) -> list[Group]:
    """Groups of `before`, begun under the version that the engine runs, and of `after`, begun under version
    2, which it takes in after three tokens. All in one call, so that it does not hang on who is faster."""
    tickets = [Ticket(i, prompt, derive(0, i)) for i, prompt in enumerate([*before, *after])]
    count = len(before)

    def draw_there(worker: Any) -> list[Group]:
        sampler, worker.in_flight = worker.sampler, in_flight
        names = [sampler.begin(ticket, SAMPLING, "before") for ticket in tickets[:count]]
        for _ in range(4):  # the first is the prompts'
            sampler.step()
        worker.deliver(parcel, 2)
        names += [sampler.begin(ticket, SAMPLING, "after") for ticket in tickets[count:]]
        while sampler.running:
            sampler.step()
        worker.in_flight = True
        return [sampler.group_of(name, ticket) for name, ticket in zip(names, tickets, strict=True)]

    handle: Any = pool.actors.handles[0]
    groups: list[Group] = ray.get(handle.__ray_call__.remote(draw_there), timeout=120)
    return groups


def completions_of(groups: list[Group]) -> list[Completion]:
    return list(chain.from_iterable(group.completions for group in groups))


def largest_gap(model: Any, pool: RolloutPool, groups: list[Group]) -> tuple[float, float]:
    """Engine against Hugging Face: by decoding (what the completions carry) and by prefill (the parity
    check)."""
    data = sequences_of(groups)
    truth = models.naive_logprobs(model, data)
    decoded = np.concatenate([completion.logprobs for completion in completions_of(groups)])
    return float(abs(decoded - truth).max()), float(abs(pool.logprobs(data) - truth).max())
