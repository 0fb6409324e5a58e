"""Memory of a run's actors on their machines, shared libraries and the object store not counted."""

from __future__ import annotations

from collections.abc import Sequence

from frpo.config import Config, DownstreamRl, DownstreamSft, TrainConfig
from frpo.forecast.cards import (
    GIB,
    LOADED,
    Need,
    count_trained,
    estimate_largest_training,
    estimate_scorer,
    list_trainings,
)
from frpo.planning import TRAINS, Actor, Plan
from frpo.shape import BYTES, Shape

PROCESS_GIB = {
    "rollout": 0.7,
    "learner": 0.47,
    "finetune": 0.45,
    "reference": 0.38,
    "evaluate": 0.38,
    "reward": 0.085,
}
"""Of each actor by itself, with the libraries that it imports."""

Line = tuple[str, float]


def estimate_host_needs(config: Config, shape: Shape, asked: Plan) -> list[Need]:
    """Host memory of one actor of each role."""
    by_role = []
    for actor in asked.actors:
        if actor.role in PROCESS_GIB:
            process = ("process", PROCESS_GIB[actor.role])
            by_role.append(Need(actor.role, (process, *_list_lines_beside(config, shape, actor)), ""))
    return by_role


def sum_host_gib(needs: Sequence[Need], asked: Plan) -> float:
    """Of all actors together. Learner and fine-tune ranks never hold a policy at once."""
    counts = {actor.role: actor.count for actor in asked.actors}
    gib = {need.role: need.gib * counts[need.role] for need in needs}
    waiting = PROCESS_GIB["finetune"] * counts.get("finetune", 0)
    return sum(gib.values()) - min(gib["learner"], gib.get("finetune", 0.0)) + waiting


def _list_lines_beside(config: Config, shape: Shape, actor: Actor) -> list[Line]:
    """What an actor holds beside the process itself."""
    role = actor.role
    if role == "reward":
        return []
    weights = shape.weights * BYTES[config.model.dtype] / GIB
    ends: list[Line] = []
    if role == "finetune" and _keeps_ends(config, role):
        ends.append(("both ends of an interpolation", 2 * weights))
    if actor.num_gpus > 0:
        return ends + _list_copies_of_card(config, shape, role, weights)
    if role == "rollout":  # vLLM packs a copy of them for the CPU
        return [("weights", 2 * weights), ("KV cache", float(config.rollout.kv_cache_gib))]
    need = (
        estimate_largest_training(config, shape, role)
        if role in TRAINS
        else estimate_scorer(config, shape, role)
    )
    others = [line for line in need.lines if line[0] not in ("weights", "context")]
    return [("weights", _count_copies(config, role) * weights), *others, *ends]


def _keeps_ends(config: Config, role: str) -> bool:
    """Whether ranks keep all weights that a fine-tune began with and ended in, to go between them."""
    whole = [train for train in list_trainings(config, role) if config.model_of(train).lora is None]
    return any(isinstance(train, DownstreamSft) and bool(train.interpolate) for train in whole)


def _count_copies(config: Config, role: str) -> int:
    """Policies whose weights a process on the CPU has to itself: what it trains, and merged adapters. All
    others lie in files that are mapped into memory, once for all processes of a machine."""
    if config.model.lora is None:
        return int(role not in LOADED)
    if config.model.dtype != "float32":
        return 0
    arms_go_on = config.attack or any(isinstance(task, DownstreamRl) for task in config.downstream)
    return int(role in ("finetune", "evaluate") or bool(arms_go_on))


def _list_copies_of_card(config: Config, shape: Shape, role: str, weights: float) -> list[Line]:
    """Of what an actor has on its card. `weights`: those of a policy, GiB."""
    lines: list[Line] = []
    left = LOADED.get(role, 1) * weights
    if role in TRAINS:
        offloaded = max(_estimate_offloaded(config, shape, train) for train in list_trainings(config, role))
        if offloaded:
            lines.append(("states on the host (offload)", offloaded))
        most = max(count_trained(config.model_of(train), shape) for train in list_trainings(config, role))
        states = 12 * most / config.learner.num_workers / GIB
        lines.append(("a checkpoint, while it is written", states))
        left += states
    if config.rollout.sleep:
        lines.append(("what has left the card", left))
    return lines


def _estimate_offloaded(config: Config, shape: Shape, train: TrainConfig) -> float:
    """What a rank leaves on the host by ZeRO-Offload, GiB."""
    if train.offload == "none":
        return 0.0
    offloaded = 12 * count_trained(config.model_of(train), shape)
    if train.offload == "all":
        offloaded += shape.weights * BYTES[config.model.dtype]
    return offloaded / config.learner.num_workers / GIB
