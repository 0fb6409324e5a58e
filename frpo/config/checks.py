"""What the sections of a configuration must agree on: batches and ranks, groups and radii, nuclei and KLs.
Each function raises ValueError with the field, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from frpo.config.finetuning import DownstreamRl, DownstreamSft
from frpo.config.training import ArmConfig, TrainConfig

if TYPE_CHECKING:
    from frpo.config.run import Config

MOST_WORKERS = 4096
"""Actors of one role."""


def loops_of(config: Config) -> Iterator[tuple[str, ArmConfig | DownstreamRl]]:
    """Where the recipe describes what the loop trains, and that section."""
    for arm in config.arms:
        yield f"arms.{arm.name}", arm
    for task in config.downstream:
        if isinstance(task, DownstreamRl):
            yield f"downstream.{task.name}", task


def check_marks(config: Config) -> None:
    for task in config.downstream:
        late = [mark for mark in task.marks if mark > task.num_steps]
        if late:
            raise ValueError(
                f"downstream.{task.name}.marks: {late[0]} is after the last step {task.num_steps}; lower it"
            )


def check_batches(config: Config) -> None:
    """That every rank of the learner has a part of each batch."""
    ranks = config.learner.num_workers
    for what, batch in _batches_of(config):
        if batch < ranks:
            raise ValueError(
                f"learner.num_workers: {ranks} ranks share a batch of {batch} ({what}); use at most {batch}"
            )


def _batches_of(config: Config) -> Iterator[tuple[str, int]]:
    rollout = config.rollout
    yield "rollout.prompts_per_step x rollout.group_size", rollout.prompts_per_step * rollout.group_size
    for task in config.downstream:
        if isinstance(task, DownstreamSft):
            yield f"downstream.{task.name}.batch_size", task.batch_size
    if config.base:
        yield "base.batch_size", config.base.batch_size


def check_transport(config: Config) -> None:
    rollout = config.rollout
    if rollout.tensor_parallel > 1 and rollout.transport == "object_store" and not config.sends_adapters:
        raise ValueError("rollout.tensor_parallel: above 1 it needs rollout.transport: process_group")


def check_staleness(config: Config) -> None:
    """That engines have cards of their own where they are to draw while the learner updates, and that nobody
    counts on the same bits, which depend on when they do."""
    rollout = config.rollout
    if rollout.staleness and rollout.sleep:
        raise ValueError(
            f"rollout.staleness: {rollout.staleness} draws while the learner updates, and with rollout.sleep "
            "both take turns on one GPU; set it to 0, or give the engines GPUs of their own"
        )
    if rollout.staleness and config.model.deterministic:
        raise ValueError(
            f"rollout.staleness: {rollout.staleness} lets a run depend on who is done first, and "
            "model.deterministic pays for the same bits each time; set it to 0, or leave deterministic out"
        )


def check_nucleus(config: Config) -> None:
    """That nothing is steered to a KL of what a nucleus draws, which is not the policy's."""
    top_p = config.rollout.top_p
    if top_p == 1:
        return
    remedy = f"what rollout.top_p = {top_p:g} draws tells the nucleus's, not the policy's: set it to 1"
    for where, loop in loops_of(config):
        target = loop.objective.target_kl
        if target is not None:
            raise ValueError(
                f"{where}.objective.target_kl: {target:g} is steered by a KL; {remedy}, or leave target_kl "
                "out"
            )
    if config.attack:
        raise ValueError(
            f"attack.radii: {config.attack.radii[0]:g} is a KL to steer to; {remedy}, or leave attack out"
        )


def check_loop(config: Config, where: str, loop: ArmConfig | DownstreamRl) -> None:
    """That groups are large enough for the radius, and micro-batches for a sequence."""
    rollout = config.rollout
    rho = loop.objective.estimator.radius
    # of all weights on k completions, those on a single one are furthest from equal ones: KL = log k
    most = math.log(rollout.group_size)
    if rho is not None and rho >= most:
        raise ValueError(
            f"{where}.objective.estimator.rho: {rho:g} is not below log k = {most:.2f} nats, the most that a "
            f"group of {rollout.group_size} completions can express; lower rho or raise rollout.group_size"
        )
    budget = loop.learner.micro_batch_tokens
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    if budget < longest:
        field = "learner" if budget == config.learner.micro_batch_tokens else f"{where}.learner"
        raise ValueError(
            f"{field}.micro_batch_tokens: {budget} is less than one sequence of "
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}; raise it"
        )


def check_ascent(config: Config) -> None:
    """That what an ascent adds to a weight is not lost between the numbers of its dtype."""
    if config.model.dtype == "float32":
        return
    for where, train in trainings_of(config):
        if train.sam is not None:
            raise ValueError(
                f"{where}.sam: {train.sam:g} spread over all weights is lost between the numbers of "
                f"{config.model.dtype}; take model.dtype: float32, or leave it out"
            )


def trainings_of(config: Config) -> Iterator[tuple[str, TrainConfig]]:
    """Where the recipe describes each training, and that section."""
    for where, loop in loops_of(config):
        yield f"{where}.learner", loop.learner
    for task in config.downstream:
        if isinstance(task, DownstreamSft):
            yield f"downstream.{task.name}", task
    if config.base:
        yield "base", config.base


def check_audit(config: Config) -> None:
    """That an audit is of one policy, and that its grid alone says what is varied."""
    audit = config.audit
    if audit is None:
        return
    if config.arms:
        raise ValueError(
            f"audit: it is of one policy, and the recipe trains {len(config.arms)} arms; leave them out and "
            "give the folder of one of them as model.path"
        )
    if config.model.lora:
        raise ValueError(
            "model.lora: an audit has adapters of the ranks in audit.ranks; leave it out, or give "
            f"audit.ranks: [{config.model.lora.rank}]"
        )
    for task in config.downstream:
        steps = audit.steps if isinstance(task, DownstreamSft) else audit.rl_steps
        train = task if isinstance(task, DownstreamSft) else task.learner
        if len(steps) > 1 and train.schedule != "constant":
            raise ValueError(
                f"downstream.{task.name}.schedule: {train.schedule} ends with the last step, and audit.steps "
                "measures earlier ones too; set it to constant, or give one number of steps"
            )


def check_counts(config: Config) -> None:
    for where, workers in (
        ("rollout", config.rollout),
        ("reward", config.reward),
        ("reference", config.reference),
        ("evaluate", config.evaluate),
    ):
        if workers.num_workers > MOST_WORKERS:
            raise ValueError(f"{where}.num_workers: {workers.num_workers} actors; use at most {MOST_WORKERS}")
