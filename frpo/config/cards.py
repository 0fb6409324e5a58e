"""What GPUs and engines can be asked for together: cards that roles share, and adapters that engines
apply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frpo.config.checks import trainings_of
from frpo.config.finetuning import DownstreamSft
from frpo.config.training import Workers

if TYPE_CHECKING:
    from frpo.config.run import Config

LARGEST_RANK = 512
"""Of an adapter that vLLM serves (`MaxLoRARanks` in vllm/config/lora.py)."""


def check_cards(config: Config) -> None:
    """That roles can stand on the GPUs that they ask for, and those that share cards can hold them in turn.
    Raises ValueError."""
    for where, workers in [("learner", config.learner), *_scorers_of(config)]:
        if workers.num_gpus > 1:
            raise ValueError(
                f"{where}.num_gpus: {workers.num_gpus:g}, and each worker computes on one GPU; raise "
                f"{where}.num_workers instead"
            )
    if config.rollout.sleep:
        _check_pairs(config)
        _check_scorers(config)
        _check_what_leaves(config)
    else:
        _check_own_cards(config.learner)


def _scorers_of(config: Config) -> list[tuple[str, Workers]]:
    return [("reference", config.reference), ("evaluate", config.evaluate)]


def _check_own_cards(learner: Workers) -> None:
    if learner.num_workers > 1 and 0 < learner.num_gpus < 1:
        raise ValueError(
            f"learner.num_gpus: {learner.num_gpus:g} may put two ranks on one GPU, which NCCL refuses; "
            "give 1, or share each card with an engine by rollout.sleep"
        )


def _check_pairs(config: Config) -> None:
    """With rollout.sleep: that each engine shares its card with one learner rank."""
    rollout, learner = config.rollout, config.learner
    if rollout.num_gpus == 0 or learner.num_gpus == 0 or rollout.transport != "object_store":
        raise ValueError(
            "rollout.sleep: it is for engines and learners that share cards: rollout.num_gpus and "
            "learner.num_gpus above 0, and rollout.transport: object_store"
        )
    if rollout.num_workers != learner.num_workers or rollout.tensor_parallel > 1:
        raise ValueError(
            "rollout.sleep: engine i shares its card with learner rank i, and there are "
            f"{rollout.num_workers} engines on {rollout.tensor_parallel} GPUs each and "
            f"{learner.num_workers} ranks; make rollout.num_workers and learner.num_workers equal, and "
            "rollout.tensor_parallel 1"
        )


def _check_scorers(config: Config) -> None:
    """With rollout.sleep: that every scorer on a GPU finds a card of a learner rank."""
    cards = config.learner.num_workers
    for where, workers in _scorers_of(config):
        if workers.num_gpus > 0 and workers.num_workers > cards:
            raise ValueError(
                f"{where}.num_workers: {workers.num_workers} on {cards} cards that are shared "
                f"(rollout.sleep); lower it, or set {where}.num_gpus to 0"
            )


def _check_what_leaves(config: Config) -> None:
    """With rollout.sleep: that what trains can give the memory of its card back."""
    for where, train in [("learner", config.learner), *trainings_of(config)]:
        if train.offload == "all":
            raise ValueError(
                f"{where}.offload: all keeps the weights off the GPU already; with rollout.sleep use none or "
                "optimizer"
            )
        if config.model_of(train).lora and train.zero_stage == 3:
            raise ValueError(
                f"{where}.zero_stage: 3 cannot give its memory back with adapters (rollout.sleep); use 1 or 2"
            )


def check_served(config: Config) -> None:
    """That engines can run the adapter in training, and exactly it. Raises ValueError."""
    lora = config.model.lora
    if config.reference.share and not lora:
        raise ValueError(
            f"reference.share: {config.reference.share} switches the learner's adapters off, and model.lora "
            "is null; train adapters, or leave share out"
        )
    if lora and not config.sends_adapters and config.model.dtype != "float32":
        raise ValueError(
            f"rollout.lora: merged is for float32, and model.dtype is {config.model.dtype}: most of an early "
            "update is lost between its numbers, and engines would draw from another policy; use adapter"
        )
    most = LARGEST_RANK
    beside = ""
    if config.model.dtype == "bfloat16" and (config.downstream or config.attack):
        most = LARGEST_RANK // 2
        beside = f", the adapter of an arm and that of its fine-tune side by side ({LARGEST_RANK} in all)"
    if lora and config.sends_adapters and lora.rank > most:
        raise ValueError(
            f"model.lora.rank: {lora.rank} is more than the {most} that vLLM serves{beside}; lower it, or "
            "train in float32 with rollout.lora: merged"
        )


def check_adapters(config: Config) -> None:
    """That a fine-tune with adapters of its own, or none, begins from the arm's policy exactly, and that
    engines can run it. Raises ValueError."""
    for task in config.downstream:
        if not isinstance(task, DownstreamSft) or task.lora == "run":
            continue
        where, arms = f"downstream.{task.name}.lora", config.model.lora
        if config.model.dtype != "float32" and (task.lora is None) != (arms is None):
            raise ValueError(
                f"{where}: adapters on one side alone, arm or fine-tune, are merged into weights, and "
                f"model.dtype is {config.model.dtype}, whose numbers lose a part of them; give both adapters "
                "or none, or take float32"
            )
        if not config.sends_adapters:
            continue
        if task.lora is None and config.rollout.tensor_parallel > 1:
            raise ValueError(
                f"{where}: null sends all weights to engines of {config.rollout.tensor_parallel} GPUs, and "
                "rollout.lora: adapter the adapter alone; set rollout.lora: merged and rollout.transport: "
                "process_group"
            )
        beside = arms.rank if arms and config.model.dtype != "float32" else 0
        if task.lora and task.lora.rank + beside > LARGEST_RANK:
            raise ValueError(
                f"{where}.rank: {task.lora.rank}{f' beside the {beside} of the arm' if beside else ''} is "
                f"more than the {LARGEST_RANK} that vLLM serves; lower it"
            )
