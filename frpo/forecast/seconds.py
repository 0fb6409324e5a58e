"""Seconds of a step, by phase, if every completion is as long as it may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from frpo.config import Config, LearnerConfig
from frpo.forecast.cards import Card, count_trained
from frpo.planning import Plan
from frpo.shape import BYTES, Shape

DECODED_BANDWIDTH = 0.53
"""Share of the data sheet's bandwidth at which an engine reads weights and KV cache."""
SAMPLED_S = 15e-6
"""Of each sequence at each token: sampling and Python."""
PREFILLED_FLOPS = 0.5
"""Share of the data sheet's products that an engine reaches on prompts."""
STORE_BYTES_S = 1.6e9
"""Through the object store: 15.2 GB to the host in 9.5 s were measured."""
GROUP_BYTES_S = 20e9
"""By a broadcast between cards."""


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float


def estimate_phases(
    config: Config, learner: LearnerConfig, shape: Shape, card: Card, asked: Plan
) -> Iterator[Phase]:
    """Of one step of an arm; rewards are not known, nor what waits for them."""
    rollout = config.rollout
    ranks = config.learner.num_workers
    yield Phase("generate", _estimate_generation(config, shape, card))
    completions = rollout.prompts_per_step * rollout.group_size
    tokens = completions * rollout.max_new_tokens + rollout.prompts_per_step * config.data.max_prompt_tokens
    # a forward pass takes two operations a weight and token, a backward pass four
    forward = 2 * shape.weights * tokens / (_efficiency_of(shape) * card.tflops * 1e12)
    for actor in asked.actors:
        if actor.role == "reference" and actor.num_gpus > 0:
            yield Phase("reference", forward / actor.count)
    operations = 4 if config.model.lora else 6  # no gradients of frozen weights
    if config.model.gradient_checkpointing:
        operations += 2
    if learner.sam is not None:
        operations *= 2
    yield Phase("update", operations / 2 * forward / ranks)
    own = any(arm.objective.wants_divergence for arm in config.arms) or learner.wants_old
    passes = own + (config.reference.share is not None)
    if passes:
        yield Phase("log-probs by the learner", passes * forward / ranks)
    yield Phase("publish", _estimate_publishing(config, shape))


def _efficiency_of(shape: Shape) -> float:
    """Share of the data sheet's products that training and scoring reach: 37 % measured at 7.6B, 9 % at
    0.5B."""
    return 0.37 * min(1.0, shape.hidden / 3584)


def _estimate_generation(config: Config, shape: Shape, card: Card) -> float:
    """Prompts in one pass; then each token of a batch reads the weights, and a KV cache that is half full of
    new tokens on average."""
    rollout = config.rollout
    prompt, new = config.data.max_prompt_tokens, rollout.max_new_tokens
    completions = rollout.prompts_per_step * rollout.group_size
    drawn = -(-completions // rollout.num_workers)
    width = min(drawn, rollout.max_num_seqs)
    numbers = shape.weights + width * (prompt + new / 2) * shape.kv_per_token
    read = numbers * BYTES[config.model.dtype] / rollout.tensor_parallel
    token = read / (DECODED_BANDWIDTH * (card.gb_s * 1e9)) + width * SAMPLED_S
    prompts = rollout.prompts_per_step / rollout.num_workers
    flops = PREFILLED_FLOPS * (card.tflops * 1e12)
    prefill = 2 * shape.weights * prompts * prompt / flops / rollout.tensor_parallel
    return new * token * drawn / width + prefill


def _estimate_publishing(config: Config, shape: Shape) -> float:
    sent = count_trained(config.model, shape) if config.sends_adapters else shape.weights
    speed = GROUP_BYTES_S if config.rollout.transport == "process_group" else STORE_BYTES_S
    return 0.2 + sent * BYTES[config.model.dtype] / speed


def sum_step_seconds(phases: Sequence[Phase], *, shared: bool, ahead: bool = False) -> float:
    """Scoring runs beside the generation unless the roles share cards. Ahead of the learner the generation
    runs beside all that the learner does, and a step takes as long as the slower of the two."""
    seconds = {phase.name: phase.seconds for phase in phases}
    beside = [seconds.pop("reference", 0.0), seconds.pop("log-probs by the learner", 0.0)]
    if shared:
        return sum(seconds.values()) + sum(beside)
    if ahead:
        generate = max(seconds.pop("generate"), beside[0])
        return max(generate, sum(seconds.values()) + beside[1])
    return sum(seconds.values()) + max(0.0, max(beside) - seconds["generate"])
