"""What a run will take on its cards: memory by role and line, and seconds by phase, before anything starts.

Computed from the recipe, the model's config.json and the card. The rates and what libraries keep are measured
ones of an H100 (docs/results/gpu.json, docs/results/README.md); on other cards they are scaled by the data
sheet, and nobody has checked them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from frpo.config import Config, DownstreamRl, DownstreamSft, FinetuneConfig, LearnerConfig, TrainConfig
from frpo.planning import Actor, Plan
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
    c.name: c
    for c in (
        Card("A100-40GB", 39.4, 312, 1555), Card("A100-80GB", 79.1, 312, 2039), Card("H100", 79.2, 990, 3350),
        Card("H200", 139.8, 990, 4800), Card("L40S", 44.4, 362, 864),
    )
}  # fmt: skip

CONTEXT_GIB = 0.6
"""Of each process on a card: CUDA's context and what libraries keep."""
ENGINE_GIB = 3.0
"""vLLM's activations, CUDA graphs and sampler."""
LOADED = {"reference": 1, "evaluate": 2}
"""Policies that a scorer has loaded at once."""


@dataclass(frozen=True)
class Need:
    """The memory of one actor of a role on its card, GiB by line."""

    role: str
    lines: tuple[tuple[str, float], ...]
    remedy: str
    """The fields that lower it."""

    @property
    def gib(self) -> float:
        return sum(gib for _, gib in self.lines)


def activations(shape: Shape, tokens: int, size: int, *, checkpointing: bool, kept: bool = True) -> float:
    """Bytes between the forward and the backward pass; `kept` False: of a forward pass alone.

    A layer keeps four times its MLP's width and eight times its own in the dtype, and its norms' inputs in
    float32: 68 KB a token at
    0.5B, where 68 were measured.
    """
    layer = tokens * (shape.intermediate * 4 * size + shape.hidden * (8 * size + 16))
    if not kept:
        return layer
    return shape.layers * tokens * shape.hidden * size + layer if checkpointing else shape.layers * layer


def logits(shape: Shape, tokens: int) -> float:
    """Bytes of a chunk of them, there and back: four copies."""
    return 4 * 4 * min(tokens * shape.vocabulary, max(CHUNK_ELEMENTS, CHUNK_POSITIONS * shape.vocabulary))


def micro_batch(config: Config, train: TrainConfig) -> int:
    """Tokens of a rank's largest, at most; completions of a prompt share it."""
    rollout = config.rollout
    batch = rollout.prompts_per_step * (
        config.data.max_prompt_tokens + rollout.group_size * rollout.max_new_tokens
    )
    if isinstance(train, FinetuneConfig):
        batch = train.batch_size * train.max_tokens
    return min(train.micro_batch_tokens, -(-batch // config.learner.num_workers))


def training(config: Config, shape: Shape, train: TrainConfig) -> Need:
    """A rank of the learner, or of a fine-tune: they never hold memory at once."""
    model, ranks, size = config.model, config.learner.num_workers, BYTES[config.model.dtype]
    sharded = ranks if train.zero_stage == 3 else 1
    trained = shape.adapters(model.lora) if model.lora else shape.weights
    states = (
        12 * trained / ranks if train.offload == "none" else 0.0
    )  # master weights and two moments, float32
    gradients = 4 * trained / (ranks if train.zero_stage >= 2 or size == 2 else 1)
    tokens = micro_batch(config, train)
    held = activations(shape, tokens, size, checkpointing=model.gradient_checkpointing)
    remedies = [] if model.gradient_checkpointing else ["model.gradient_checkpointing: true"]
    remedies += ["a lower learner.micro_batch_tokens", "more learner.num_workers"]
    remedies += [] if model.lora else ["learner.zero_stage: 3", "model.lora"]
    return Need(
        "learner",
        (
            (
                "weights",
                (shape.weights / sharded + (trained if model.lora else 0)) * size / GIB
                if train.offload != "all"
                else 0.0,
            ),
            ("gradients", gradients / GIB),
            ("optimizer", states / GIB),
            ("activations", held / GIB),
            ("logits", logits(shape, tokens) / GIB),
            ("context", CONTEXT_GIB),
        ),
        ", ".join(remedies),
    )


def evaluated(config: Config) -> int:
    """Held-out prompts, at most; no fewer than fill a pass where their number is open."""
    tasks = {source.task for source in config.data.heldout}
    most = config.evaluate.max_prompts
    return BUDGET_TOKENS if most is None or None in tasks else most * len(tasks)


def frozen(config: Config, shape: Shape, role: str) -> Need:
    """A scorer with the policies that it has loaded, whole ones, adapters included."""
    size, prompts, each = (
        BYTES[config.model.dtype],
        1,
        config.rollout.group_size,
    )  # the reference has a group at a time
    if role == "evaluate":
        prompts, each = evaluated(config), config.evaluate.completions_per_prompt
    drawn = prompts * each * config.rollout.max_new_tokens
    tokens = min(BUDGET_TOKENS, prompts * config.data.max_prompt_tokens + drawn)
    passing = activations(shape, tokens, size, checkpointing=False, kept=False)
    lines = (
        ("weights", LOADED[role] * shape.weights * size / GIB),
        ("activations", passing / GIB),
        ("logits", logits(shape, min(tokens, drawn)) / GIB),
        ("context", CONTEXT_GIB),
    )
    return Need(role, lines, f"{role}.num_gpus: 0 (on the CPU), or a card of its own ({role}.num_gpus: 1)")


def engine(config: Config, shape: Shape, card: Card) -> Need:
    """One card of an engine: all that gpu_memory_utilization gives it; the KV cache is what the rest
    leaves."""
    rollout, size = config.rollout, BYTES[config.model.dtype]
    weights = shape.weights * size / rollout.tensor_parallel / GIB
    adapters = (
        shape.adapters(config.model.lora) * size / GIB if config.model.lora and config.sends_adapters else 0.0
    )
    cache = rollout.gpu_memory_utilization * card.gib - weights - adapters - ENGINE_GIB
    lines = (
        ("weights", weights),
        ("adapters", adapters),
        ("activations, graphs", ENGINE_GIB),
        ("KV cache", cache),
    )
    return Need("rollout", lines, "a higher rollout.gpu_memory_utilization, or rollout.tensor_parallel")


def needs(config: Config, shape: Shape, card: Card, asked: Plan) -> list[Need]:
    """Of every role that stands on cards, one actor each."""
    on_cards = {a.role for a in asked.actors if a.num_gpus > 0}
    found = [engine(config, shape, card)] if "rollout" in on_cards else []
    if "learner" in on_cards:
        found.append(
            max(
                (
                    training(config, shape, t)
                    for role in ("learner", "finetune")
                    for t in trainings(config, role)
                ),
                key=attrgetter("gib"),
            )
        )
    found += [frozen(config, shape, role) for role in LOADED if role in on_cards]
    return found


def too_much(config: Config, shape: Shape, card: Card, asked: Plan) -> list[str]:
    """What does not fit, a line each, with the fields that would help. Roles that take turns (rollout.sleep)
    have the card to themselves, but for each other's contexts; others the share of it that they ask for."""
    found = []
    everybody = needs(config, shape, card, asked)
    for need in everybody:
        actor = next(a for a in asked.actors if a.role == need.role)
        share = (
            1.0 if config.rollout.sleep or need.role in ("learner", "rollout") else min(1.0, actor.num_gpus)
        )
        room = share * card.gib - (CONTEXT_GIB * (len(everybody) - 1) if config.rollout.sleep else 0.0)
        where = f"of the {room:.1f} GiB that it can have of a {card.name}"
        if need.gib > room + 1e-6:
            lines = ", ".join(f"{name} {gib:.1f}" for name, gib in need.lines if gib >= 0.05)
            found.append(
                f"GPU memory: {need.role} needs {need.gib:.1f} GiB ({lines}) {where}; set {need.remedy}"
            )
        if need.role == "rollout":
            longest = (
                config.num_tokens_limit
                * shape.kv_per_token
                * BYTES[config.model.dtype]
                / config.rollout.tensor_parallel
                / GIB
            )
            cache = dict(need.lines)["KV cache"]
            if cache < longest:
                found.append(
                    f"GPU memory: an engine's weights leave {max(0.0, cache):.1f} GiB of a {card.name} for "
                    "the KV cache, and one sequence of "
                    f"{config.num_tokens_limit} tokens takes {longest:.1f}; set {need.remedy}"
                )
    return found


# ---- host memory

PROCESS_GIB = {
    "rollout": 0.7,
    "learner": 0.47,
    "finetune": 0.45,
    "reference": 0.38,
    "evaluate": 0.38,
    "reward": 0.085,
}
"""Of each actor by itself, with the libraries that it imports."""


def host_needs(config: Config, shape: Shape, asked: Plan) -> list[Need]:
    """Host memory of one actor of each role, shared libraries and the object store not counted."""
    return [_host_need(config, shape, actor) for actor in asked.actors if actor.role in PROCESS_GIB]


def host_gib(needs: Sequence[Need], asked: Plan) -> float:
    """Of all actors together. Learner and fine-tune ranks never hold a policy at once."""
    counts = {a.role: a.count for a in asked.actors}
    by = {need.role: need.gib * counts[need.role] for need in needs}
    return (
        sum(by.values()) - min(by["learner"], by["finetune"]) + PROCESS_GIB["finetune"] * counts["finetune"]
    )


def _host_need(config: Config, shape: Shape, actor: Actor) -> Need:
    role, process, weights = (
        actor.role,
        ("process", PROCESS_GIB[actor.role]),
        shape.weights * BYTES[config.model.dtype] / GIB,
    )
    if role == "reward":
        lines = [process]
    elif actor.num_gpus > 0:
        lines = [process, *_host_copies(config, shape, role, weights)]
    elif role == "rollout":  # vLLM packs a copy of them for the CPU
        lines = [process, ("weights", 2 * weights), ("KV cache", float(config.rollout.kv_cache_gib))]
    else:
        trains = role in ("learner", "finetune")
        most = (
            max((training(config, shape, t) for t in trainings(config, role)), key=attrgetter("gib"))
            if trains
            else frozen(config, shape, role)
        )
        left_out = ("weights", "context")
        lines = [
            process,
            ("weights", _merged(config, role) * weights),
            *(line for line in most.lines if line[0] not in left_out),
        ]
    return Need(role, tuple(lines), "")


def _merged(config: Config, role: str) -> int:
    """Policies whose weights a process on the CPU has to itself: what it trains, and merged adapters. All
    others lie in files that are mapped into memory, once for all processes of a machine."""
    if config.model.lora is None:
        return int(role not in LOADED)
    if config.model.dtype != "float32":
        return 0
    arms_go_on = config.attack is not None or any(isinstance(d, DownstreamRl) for d in config.downstream)
    return int(role in ("finetune", "evaluate") or arms_go_on)


def _host_copies(config: Config, shape: Shape, role: str, weights: float) -> list[tuple[str, float]]:
    """Of what an actor has on its card."""
    lines: list[tuple[str, float]] = []
    if role in ("learner", "finetune"):
        kept = max((_offloaded(config, shape, train) for train in trainings(config, role)), default=0.0)
        lines += [("states on the host (offload)", kept)] if kept else []
    states = (
        12
        * (shape.adapters(config.model.lora) if config.model.lora else shape.weights)
        / config.learner.num_workers
        / GIB
    )
    if role in ("learner", "finetune"):
        lines.append(("a checkpoint, while it is written", states))
    if config.rollout.sleep:
        lines.append(("what has left the card", LOADED.get(role, 1) * weights + (states if lines else 0.0)))
    return lines


def _offloaded(config: Config, shape: Shape, train: TrainConfig) -> float:
    """GiB that a rank leaves on the host by ZeRO-Offload."""
    trained = shape.adapters(config.model.lora) if config.model.lora else shape.weights
    states = 12 * trained if train.offload != "none" else 0
    return (
        (states + (shape.weights * BYTES[config.model.dtype] if train.offload == "all" else 0))
        / config.learner.num_workers
        / GIB
    )


def trainings(config: Config, role: str) -> list[TrainConfig]:
    """Settings of all that a role trains."""
    if role == "learner":
        return [
            config.learner,
            *(a.learner for a in config.arms),
            *(d.learner for d in config.downstream if isinstance(d, DownstreamRl)),
        ]
    return [
        *([config.base] if config.base else []),
        *(d for d in config.downstream if isinstance(d, DownstreamSft)),
    ] or [config.learner]


# ---- seconds


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float


def efficiency(shape: Shape) -> float:
    """Share of the data sheet's products that training and scoring reach: 37 % measured at 7.6B, 9 % at
    0.5B."""
    return 0.37 * min(1.0, shape.hidden / 3584)


def step_phases(
    config: Config, learner: LearnerConfig, shape: Shape, card: Card, asked: Plan
) -> Iterator[Phase]:
    """Seconds of one step of an arm, if every completion is as long as it may be; rewards are not known, nor
    what waits for them."""
    rollout, size = config.rollout, BYTES[config.model.dtype]
    count = rollout.prompts_per_step * rollout.group_size
    prompt, new = config.data.max_prompt_tokens, rollout.max_new_tokens
    flops, bandwidth = card.tflops * 1e12, card.gb_s * 1e9
    drawn = -(-count // rollout.num_workers)
    width = min(drawn, rollout.max_num_seqs)
    read = (shape.weights + width * (prompt + new / 2) * shape.kv_per_token) * size / rollout.tensor_parallel
    token = read / (0.53 * bandwidth) + width * 15e-6  # the second: of each sequence, sampling and Python
    prefill = (
        2
        * shape.weights
        * rollout.prompts_per_step
        / rollout.num_workers
        * prompt
        / (0.5 * flops)
        / rollout.tensor_parallel
    )
    yield Phase("generate", new * token * drawn / width + prefill)
    tokens, rate = count * new + rollout.prompts_per_step * prompt, efficiency(shape) * flops
    scoring = 2 * shape.weights * tokens / rate
    counts = {a.role: a for a in asked.actors}
    if "reference" in counts and counts["reference"].num_gpus > 0:
        yield Phase("reference", scoring / counts["reference"].count)
    passes = (4 if config.model.lora else 6) + (2 if config.model.gradient_checkpointing else 0)
    yield Phase("update", passes / 2 * scoring / config.learner.num_workers)
    own = any(a.objective.reverse for a in config.arms) or learner.updates_per_batch > 1
    if scored := own + (config.reference.share is not None):
        yield Phase("log-probs by the learner", scored * scoring / config.learner.num_workers)
    sent = shape.adapters(config.model.lora) if config.model.lora and config.sends_adapters else shape.weights
    speed = 20e9 if rollout.transport == "process_group" else 1.6e9  # measured: 15.2 GB to the host in 9.5 s
    yield Phase("publish", 0.2 + sent * size / speed)


def step_seconds(phases: Sequence[Phase], *, shared: bool) -> float:
    """Scoring runs beside the generation unless the roles share cards."""
    by = {p.name: p.seconds for p in phases}
    beside = [by.pop("reference", 0.0), by.pop("log-probs by the learner", 0.0)]
    return sum(by.values()) + (sum(beside) if shared else max(0.0, max(beside) - by["generate"]))
