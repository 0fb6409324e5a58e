"""What a stage is, and what one is done with. A kind of stage is a file beside this one: it says what the
stage stands on, what it trains and draws, and how it is done. It imports no ML library: a plan is made of it
too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from frpo.config import (
    ArmConfig,
    Config,
    DatasetConfig,
    FinetuneConfig,
    LearnerConfig,
    ObjectiveConfig,
    Section,
    TrainConfig,
)
from frpo.records import ArmSummary, BenchmarkScore, Certificate, Evaluation, Interpolation, StageResult
from frpo.types import Prompt

BASE = "base"
"""The stage of the base policy; of a recipe without arms, the name that this policy has in their place."""


def maker_of(arm: ArmConfig) -> str:
    """Name of the stage that leaves the arm's policy."""
    return BASE if arm.name == BASE else f"rlhf/{arm.name}"


@dataclass(frozen=True)
class Data:
    """Data sets that a stage trains on, by the field of the recipe that names them."""

    field: str
    sources: tuple[DatasetConfig, ...]
    max_tokens: int | None = None
    """Of an example, prompt and completion; None for prompts."""


@dataclass(frozen=True)
class Training:
    """What a stage trains by."""

    field: str
    """Where the recipe describes it."""
    settings: TrainConfig
    num_steps: int
    objective: ObjectiveConfig | None = None
    """Of stages that run the loop; None for supervised fine-tuning."""

    @property
    def num_updates(self) -> int:
        """Optimiser updates."""
        per_step = self.settings.updates_per_batch if isinstance(self.settings, LearnerConfig) else 1
        return self.num_steps * per_step


@dataclass(frozen=True)
class Heldout:
    """How many held-out prompts there are, those dropped for their length included."""

    prompts: int
    """Of all tasks; evaluations and validations draw from them."""
    trained: int
    """Of the tasks that the rlhf stage trains on; certificates draw from them."""

    def evaluated(self, config: Config, times: int) -> int:
        """Completions of so many evaluations."""
        return self.prompts * times * config.evaluate.completions_per_prompt


@dataclass(frozen=True)
class StageName:
    """What the name of a stage says: base, <kind>/<arm>, or <kind>/<arm>/<rest>."""

    kind: str
    arm: str
    """Empty for the base; "base" where this policy stands in for the arms."""
    rest: str
    """Task of a fine-tune or radius of an attack; empty for others."""


@cache
def parse_stage(name: str) -> StageName:
    kind, arm, rest = [*name.split("/", 2), "", ""][:3]
    return StageName(kind, arm, rest)


class Stage(Protocol):
    """One unit of work with a folder and a result. Kinds inherit what is the same for most."""

    @property
    def name(self) -> str:
        """base, or <kind>/<arm>, or <kind>/<arm>/<task or radius>; harness/base. Its folder in the run."""
        ...

    @property
    def stands_on(self) -> str:
        """Name of the stage whose policy it takes; empty for the base."""
        ...

    @property
    def kind(self) -> str:
        """As fields of the configuration name it (`frpo.config.section.Redoes`)."""
        return parse_stage(self.name).kind

    @property
    def redone_as(self) -> Set[str]:
        """Kinds of stage whose fields of the configuration count for it."""
        return {self.kind}

    def sections(self) -> Mapping[str, Section]:
        """Parts of the recipe that are this stage's alone, by path: with those that all stages share they
        say what it is made from."""
        return {}

    def values(self) -> Mapping[str, JsonValue]:
        """Single values of the recipe that are this stage's alone, by path."""
        return {}

    def data(self) -> Sequence[Data]:
        """What it reads beside the run's own prompts."""
        return ()

    def training(self) -> Training | None:
        """None for stages that train nothing."""
        return None

    def num_measured(self, config: Config, heldout: Heldout) -> int | None:
        """Completions that it draws to measure; None where their number is not known."""
        ...

    def do(self, work: Workbench) -> StageResult:
        """Bring it from wherever it was left to its result."""
        ...


def fixed_end(stage: Stage) -> str:
    """Why a stage that has come to its end cannot be trained on to more steps; empty where it can, in which
    case its last checkpoint is kept."""
    training = stage.training()
    if training is None or training.objective is None:
        return "no checkpoint of a finished fine-tune is kept"
    where, train, target_kl = training.field, training.settings, training.objective.target_kl
    if train.schedule != "constant":
        return (
            f"{where}.schedule is {train.schedule}, so the learning rate of every step depends on their "
            "number"
        )
    if train.warmup_share:
        return (
            f"{where}.warmup_share is {train.warmup_share:g}, so the length of the warm-up depends on the "
            "number of steps"
        )
    if train.ema is not None:
        return f"{where}.ema is {train.ema:g}, and the policy became the average after the last step"
    if target_kl is not None:
        return f"target_kl is {target_kl:g}, and how fast the KL may rise depends on the number of steps"
    return ""


@dataclass(frozen=True)
class Pause:
    """Training stands still after `step` for whoever measures."""

    step: int
    """0: before the first of a fresh stage."""
    last: bool
    interpolation: Interpolation | None = None
    """Of a fine-tune that has one, at the last."""


@dataclass(frozen=True)
class Loop:
    """A run of the loop from the policy that the stage stands on, which is the reference too."""

    arm: ArmConfig
    """What trains it."""
    prompts: Sequence[Prompt]
    mix: Mapping[str, float] = field(default_factory=dict)
    """Shares of tasks in a batch; empty: as in the data."""
    worst: bool = False
    """Train for the least reward instead of the most."""


@dataclass(frozen=True)
class Supervised:
    """Supervised fine-tuning of the policy that the stage stands on."""

    settings: FinetuneConfig
    data: Data
    marks: tuple[int, ...] = ()
    """Steps at which it pauses, and at the last where there are any."""
    in_order: bool = False
    mix: Mapping[str, float] = field(default_factory=dict)
    """Shares of tasks in a batch; empty: as in the data."""
    heldout: Data | None = None
    """What shares of an interpolation are chosen by."""


@dataclass(frozen=True)
class Subject:
    """Whose policy is evaluated, and what it is compared with."""

    arm: str
    downstream: str | None = None
    """What the arm's policy went through; None for that policy itself."""
    before: Path | None = None
    """The arm's policy before that; None measures no KL to it."""
    loss: float | None = None
    """Of the fine-tune on held-out examples, nats per token."""


class Workbench(Protocol):
    """What stages are done with: `frpo.stages.work.Work` on the run's actors, or on fakes."""

    config: Config

    @property
    def train_prompts(self) -> Sequence[Prompt]: ...

    @property
    def has_heldout(self) -> bool: ...

    @property
    def trained_tasks(self) -> Set[str]: ...

    def policy_of(self, stage: str) -> Path:
        """Of a finished stage."""
        ...

    def read_prompts(self, data: Data) -> Sequence[Prompt]: ...

    def run_loop(self, stage: Stage, loop: Loop, kept: list[Evaluation]) -> Iterator[Pause]:
        """Pauses before the first step of a fresh stage and after every step. `kept` is filled with what was
        measured before a resume; what the caller adds at a pause is saved with the checkpoints. Exports the
        policy at the end."""
        ...

    def finetune(self, stage: Stage, finetune: Supervised, kept: list[Evaluation]) -> Iterator[Pause]:
        """As `run_loop`; pauses at the marks alone."""
        ...

    def publish_finetune(self, step: int) -> None:
        """Let the engines run the policy in fine-tuning, as version `step`."""
        ...

    def heldout_loss(self, data: Data) -> float | None:
        """Of the policy in fine-tuning, nats per token; None without data."""
        ...

    def load_policy(self, policy: Path) -> None:
        """Let the engines run a saved policy, as version 0."""
        ...

    def measure(self, stage: Stage, step: int, subject: Subject) -> Evaluation:
        """Evaluate what the engines run, published as version `step`."""
        ...

    def validate(self, stage: Stage, step: int, subject: Subject) -> Evaluation:
        """The same with fewer completions and without any KL."""
        ...

    def certify(self, stage: Stage, arm: ArmConfig) -> tuple[Certificate, ...]:
        """By draws of what the engines run that are used for nothing else."""
        ...

    def run_benchmarks(self, stage: Stage, policy: Path) -> tuple[BenchmarkScore, ...]: ...

    def summarize(self, stage: Stage, arm: str) -> ArmSummary: ...
