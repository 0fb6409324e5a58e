"""The stages of a run, in order, and what each stands on: the one list that plan, run and report go by. A
kind of stage is a file of this folder."""

from __future__ import annotations

from collections.abc import Iterator

from frpo.config import ArmConfig, Config, DownstreamConfig, DownstreamRl, GrpoEstimator, ObjectiveConfig
from frpo.outline.attack import Attack
from frpo.outline.base import Base
from frpo.outline.certify import Certify
from frpo.outline.harness import Harness
from frpo.outline.rl import Rl
from frpo.outline.rlhf import Rlhf
from frpo.outline.sft import Sft
from frpo.outline.stage import BASE, Heldout, Stage, fixed_end

__all__ = ["KINDS", "Heldout", "Stage", "fixed_end", "outline"]

KINDS = ("base", "rlhf", "certify", "downstream", "attack", "harness")


def list_stages(config: Config) -> tuple[Stage, ...]:
    """Every stage in order: each policy, the benchmarks of it, then what is made of it."""
    stages: list[Stage] = []
    for stage in _trained_and_measured(config):
        stages.append(stage)
        if config.harness and stage.kind in ("base", "rlhf", "downstream"):
            stages.append(Harness(stage.name))
    return tuple(stages)


def _trained_and_measured(config: Config) -> Iterator[Stage]:
    yield Base(config.base)
    for arm in config.arms or (stand_in(config),):
        if config.arms:
            yield Rlhf(arm)
        if config.certify:
            yield Certify(arm)
        for task in config.downstream:
            yield downstream_stage(arm, task)
        if config.attack:
            for radius in config.attack.radii:
                yield Attack(arm, config.attack, radius)


def stand_in(config: Config) -> ArmConfig:
    """The base policy in place of the arms that a recipe does not have; nothing trains it."""
    objective = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.0)
    return ArmConfig(name=BASE, objective=objective, learner=config.learner)


def downstream_stage(arm: ArmConfig, task: DownstreamConfig) -> Stage:
    if isinstance(task, DownstreamRl):
        return Rl(arm, task)
    return Sft(arm, task)
