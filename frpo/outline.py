"""The stages of a run, in order, and what each stands on: the one list that plan, run and report go by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from frpo.config import ArmConfig, Config, DownstreamConfig, DownstreamRl, ObjectiveConfig, TrainConfig

KINDS = ("base", "rlhf", "certify", "downstream", "attack", "harness")


@dataclass(frozen=True)
class Stage:
    name: str
    """base, or <kind>/<arm>, or <kind>/<arm>/<task or radius>; harness/base. Its folder in the run."""
    stands_on: str = ""
    """Name of the stage whose policy it takes; empty for the base."""
    arm: str = ""
    """Name; empty for stages of the base."""
    task: str = ""
    """Name, for stages of a downstream fine-tune."""
    radius: float | None = None
    """For attack stages, nats."""

    @property
    def kind(self) -> str:
        return self.name.split("/")[0]


def outline(config: Config) -> tuple[Stage, ...]:
    """Every stage in order."""
    return tuple(_stages(config))


def _stages(config: Config) -> Iterator[Stage]:
    yield Stage("base")
    if config.harness:
        yield Stage("harness/base", "base")
    for arm in config.arms:
        policy = f"rlhf/{arm.name}"
        yield Stage(policy, "base", arm.name)
        if config.harness:
            yield Stage(f"harness/{arm.name}", policy, arm.name)
        if config.certify:
            yield Stage(f"certify/{arm.name}", policy, arm.name)
        for task in config.downstream:
            tuned = f"downstream/{arm.name}/{task.name}"
            yield Stage(tuned, policy, arm.name, task.name)
            if config.harness:
                yield Stage(f"harness/{arm.name}/{task.name}", tuned, arm.name, task.name)
        for radius in config.attack.radii if config.attack else ():
            yield Stage(f"attack/{arm.name}/{radius:g}", policy, arm.name, radius=radius)


def arm_of(config: Config, stage: Stage) -> ArmConfig:
    return next(a for a in config.arms if a.name == stage.arm)


def task_of(config: Config, stage: Stage) -> DownstreamConfig:
    return next(d for d in config.downstream if d.name == stage.task)


def training_of(config: Config, stage: Stage) -> tuple[str, TrainConfig] | None:
    """Where in the recipe the training of a stage is described, and that section; None for what does not
    train."""
    if stage.kind == "base":
        return ("base", config.base) if config.base else None
    if stage.kind in ("rlhf", "attack"):
        return f"arms.{stage.arm}.learner", arm_of(config, stage).learner
    if stage.kind != "downstream":
        return None
    task = task_of(config, stage)
    return (
        (f"downstream.{stage.task}.learner", task.learner)
        if isinstance(task, DownstreamRl)
        else (f"downstream.{stage.task}", task)
    )


def objective_of(config: Config, stage: Stage) -> ObjectiveConfig | None:
    """Of the stages that run the loop to a number of steps of their own."""
    if stage.kind == "rlhf":
        return arm_of(config, stage).objective
    task = task_of(config, stage) if stage.kind == "downstream" else None
    return task.objective if isinstance(task, DownstreamRl) else None


def fixed_end(config: Config, stage: Stage) -> str:
    """Why a stage that has come to its end cannot be trained on to more steps; empty where it can, in which
    case its last checkpoint is kept."""
    training, objective = training_of(config, stage), objective_of(config, stage)
    if training is None or objective is None:
        return "no checkpoint of a finished fine-tune is kept"
    field, train = training
    if train.schedule != "constant":
        return f"{field}.schedule is {train.schedule}, so the learning rate of every step depends on their number"
    if train.warmup_share:
        return f"{field}.warmup_share is {train.warmup_share:g}, so the length of the warm-up depends on the number of steps"
    if objective.target_kl is not None:
        return f"target_kl is {objective.target_kl:g}, and how fast the KL may rise depends on the number of steps"
    return ""
