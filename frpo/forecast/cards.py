"""Memory of a run's actors on their cards, by role and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from frpo.config import Config, DownstreamRl, DownstreamSft, FinetuneConfig, ModelConfig, TrainConfig
from frpo.planning import TRAINS, Actor, Plan
from frpo.shape import BUDGET_TOKENS, BYTES, CHUNK_ELEMENTS, CHUNK_POSITIONS, Shape

GIB = 2**30


@dataclass(frozen=True)
class Card:
    name: str
    gib: float
    """Memory that processes can have."""
    tflops: float
    """Dense products in bfloat16, by the data sheet."""
    gb_s: float
    """Memory bandwidth, by the data sheet."""


CARDS = {
    card.name: card
    for card in (
        Card("A100-40GB", 39.4, 312, 1555),
        Card("A100-80GB", 79.1, 312, 2039),
        Card("H100", 79.2, 990, 3350),
        Card("H200", 139.8, 990, 4800),
        Card("L40S", 44.4, 362, 864),
    )
}

CONTEXT_GIB = 0.6
"""Of each process on a card: CUDA's context and what libraries keep."""
ENGINE_GIB = 3.0
"""vLLM's activations, CUDA graphs and sampler."""
LOADED = {"reference": 1, "evaluate": 2}
"""Policies that a scorer has loaded at once."""


@dataclass(frozen=True)
class Need:
    """The memory of one actor of a role, GiB by line."""

    role: str
    lines: tuple[tuple[str, float], ...]
    remedy: str
    """The fields that lower it."""

    @property
    def gib(self) -> float:
        return sum(gib for _, gib in self.lines)


def estimate_activations(
    shape: Shape, tokens: int, size: int, *, checkpointing: bool, kept: bool = True
) -> float:
    """Bytes between the forward and the backward pass; `kept` False: of a forward pass alone. A number has
    `size` bytes.

    A layer keeps four times its MLP's width and eight times its own in the dtype, and its norms' inputs in
    float32: 68 KB a token at 0.5B, where 68 were measured.
    """
    layer = tokens * (shape.intermediate * 4 * size + shape.hidden * (8 * size + 16))
    if not kept:
        return layer
    if checkpointing:  # the inputs of every layer, and one layer that is computed again
        return shape.layers * tokens * shape.hidden * size + layer
    return shape.layers * layer


def estimate_logits(shape: Shape, tokens: int) -> float:
    """Bytes of a chunk of them, there and back: four copies."""
    chunk = max(CHUNK_ELEMENTS, CHUNK_POSITIONS * shape.vocabulary)
    return 4 * 4 * min(tokens * shape.vocabulary, chunk)


def count_trained(model: ModelConfig, shape: Shape) -> int:
    """Weights that training changes: the adapters', or all."""
    return shape.adapters(model.lora) if model.lora else shape.weights


def list_trainings(config: Config, role: str) -> list[TrainConfig]:
    """Settings of all that a role trains."""
    trainings: list[TrainConfig] = []
    if role == "learner":
        trainings += [config.learner, *(arm.learner for arm in config.arms)]
        trainings += [task.learner for task in config.downstream if isinstance(task, DownstreamRl)]
        return trainings
    if config.base:
        trainings.append(config.base)
    trainings += [task for task in config.downstream if isinstance(task, DownstreamSft)]
    return trainings or [config.learner]


def find_largest_micro_batch(config: Config, train: TrainConfig) -> int:
    """Tokens of a rank's largest, at most; completions of a prompt share it."""
    if isinstance(train, FinetuneConfig):
        batch = train.batch_size * train.max_tokens
        if isinstance(train, DownstreamSft) and train.kl_to_policy:
            batch += train.batch_size * (config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    else:
        rollout = config.rollout
        group = config.data.max_prompt_tokens + rollout.group_size * rollout.max_new_tokens
        batch = rollout.prompts_per_step * group
    return min(train.micro_batch_tokens, -(-batch // config.learner.num_workers))


def estimate_training(config: Config, shape: Shape, train: TrainConfig) -> Need:
    """A rank of the learner, or of a fine-tune."""
    model = config.model_of(train)
    size = BYTES[model.dtype]
    ranks = config.learner.num_workers
    trained = count_trained(model, shape)
    weights = 0.0
    if train.offload != "all":
        sharded = ranks if train.zero_stage == 3 else 1
        adapters = trained if model.lora else 0
        weights = (shape.weights / sharded + adapters) * size
    states = 12 * trained / ranks  # float32: master weights and two moments
    if train.offload != "none":
        states = 0.0
    shards = ranks if train.zero_stage >= 2 or size == 2 else 1
    beside = 4 * (train.ema is not None) + (4 + size) * (train.sam is not None)  # whole on each rank
    tokens = find_largest_micro_batch(config, train)
    held = estimate_activations(shape, tokens, size, checkpointing=model.gradient_checkpointing)
    lines = (
        ("weights", weights / GIB),
        ("gradients", 4 * trained / shards / GIB),
        ("optimizer", states / GIB),
        *([("average and ascent", beside * trained / GIB)] if beside else []),
        ("activations", held / GIB),
        ("logits", estimate_logits(shape, tokens) / GIB),
        ("context", CONTEXT_GIB),
    )
    return Need("learner", lines, ", ".join(_list_training_remedies(config)))


def _list_training_remedies(config: Config) -> Iterator[str]:
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true"
    yield "a lower learner.micro_batch_tokens"
    yield "more learner.num_workers"
    if not config.model.lora:
        yield "learner.zero_stage: 3"
        yield "model.lora"


def estimate_largest_training(config: Config, shape: Shape, *roles: str) -> Need:
    """The need of a rank of the roles in what takes most of all that they train."""
    candidates: list[Need] = []
    for role in roles:
        candidates += [estimate_training(config, shape, train) for train in list_trainings(config, role)]
    return max(candidates, key=attrgetter("gib"))


def estimate_scorer(config: Config, shape: Shape, role: str) -> Need:
    """A scorer with the policies that it has loaded, whole ones, adapters included."""
    size = BYTES[config.model.dtype]
    prompts = 1  # the reference has a group at a time
    completions = config.rollout.group_size
    if role == "evaluate":
        prompts = count_heldout_prompts(config)
        completions = config.evaluate.completions_per_prompt
    drawn = prompts * completions * config.rollout.max_new_tokens
    tokens = min(BUDGET_TOKENS, prompts * config.data.max_prompt_tokens + drawn)
    passing = estimate_activations(shape, tokens, size, checkpointing=False, kept=False)
    lines = (
        ("weights", LOADED[role] * shape.weights * size / GIB),
        ("activations", passing / GIB),
        ("logits", estimate_logits(shape, min(tokens, drawn)) / GIB),
        ("context", CONTEXT_GIB),
    )
    return Need(role, lines, f"{role}.num_gpus: 0 (on the CPU), or a card of its own ({role}.num_gpus: 1)")


def count_heldout_prompts(config: Config) -> int:
    """Of an evaluation; no fewer than fill a pass where their number is open."""
    tasks = {source.task for source in config.data.heldout}
    most = config.evaluate.max_prompts
    return BUDGET_TOKENS if most is None or None in tasks else most * len(tasks)


def estimate_engine(config: Config, shape: Shape, card: Card) -> Need:
    """One card of an engine: all that gpu_memory_utilization gives it; the KV cache is what the rest
    leaves."""
    rollout = config.rollout
    size = BYTES[config.model.dtype]
    weights = shape.weights * size / rollout.tensor_parallel / GIB
    adapters = count_trained(config.served_model, shape) * size / GIB if config.sends_adapters else 0.0
    cache = rollout.gpu_memory_utilization * card.gib - weights - adapters - ENGINE_GIB
    lines = (
        ("weights", weights),
        ("adapters", adapters),
        ("activations, graphs", ENGINE_GIB),
        ("KV cache", cache),
    )
    return Need("rollout", lines, "a higher rollout.gpu_memory_utilization, or rollout.tensor_parallel")


def estimate_needs(config: Config, shape: Shape, card: Card, asked: Plan) -> list[Need]:
    """Of every role that stands on cards, one actor each."""
    on_cards = {actor.role for actor in asked.actors if actor.num_gpus > 0}
    by_role: list[Need] = []
    if "rollout" in on_cards:
        by_role.append(estimate_engine(config, shape, card))
    if "learner" in on_cards:
        by_role.append(estimate_largest_training(config, shape, *TRAINS))
    by_role += [estimate_scorer(config, shape, role) for role in LOADED if role in on_cards]
    return by_role


def say_too_much(config: Config, shape: Shape, card: Card, asked: Plan) -> list[str]:
    """What does not fit, a line each, with the fields that would help. Roles that take turns (rollout.sleep)
    have the card to themselves, but for each other's contexts; others the share of it that they ask for."""
    problems: list[str] = []
    everybody = estimate_needs(config, shape, card, asked)
    for need in everybody:
        actor = next(actor for actor in asked.actors if actor.role == need.role)
        room = _share_of_card(config, actor) * card.gib
        if config.rollout.sleep:
            room -= CONTEXT_GIB * (len(everybody) - 1)
        if need.gib > room + 1e-6:
            lines = ", ".join(f"{name} {gib:.1f}" for name, gib in need.lines if gib >= 0.05)
            problems.append(
                f"GPU memory: {need.role} needs {need.gib:.1f} GiB ({lines}) of the {room:.1f} GiB that it "
                f"can have of an {card.name}; set {need.remedy}"
            )
        if need.role == "rollout":
            problems += _say_small_cache(config, shape, card, need)
    return problems


def _share_of_card(config: Config, actor: Actor) -> float:
    if config.rollout.sleep or actor.role in ("learner", "rollout"):
        return 1.0
    return min(1.0, actor.num_gpus)


def _say_small_cache(config: Config, shape: Shape, card: Card, engine: Need) -> Iterator[str]:
    """Where an engine cannot hold the longest sequence."""
    bytes_per_token = shape.kv_per_token * BYTES[config.model.dtype]
    longest = config.num_tokens_limit * bytes_per_token / config.rollout.tensor_parallel / GIB
    cache = dict(engine.lines)["KV cache"]
    if cache < longest:
        yield (
            f"GPU memory: an engine's weights leave {max(0.0, cache):.1f} GiB of an {card.name} for the KV "
            f"cache, and one sequence of {config.num_tokens_limit} tokens takes {longest:.1f}; set "
            f"{engine.remedy}"
        )
