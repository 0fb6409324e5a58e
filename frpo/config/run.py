"""The root of the configuration, and what concerns the run as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, field_validator, model_validator

from frpo.config import checks
from frpo.config.audit import AuditConfig
from frpo.config.cards import check_adapters, check_cards, check_served
from frpo.config.cluster import ClusterConfig
from frpo.config.data import DataConfig
from frpo.config.estimators import merged_objective
from frpo.config.finetuning import BaseConfig, DownstreamConfig, DownstreamSft
from frpo.config.model import ModelConfig
from frpo.config.rewards import Combine, RewardConfig, check_combination, check_names
from frpo.config.section import (
    NAME,
    NOTHING,
    Content,
    Folder,
    PathText,
    Positive,
    PositiveFloat,
    Redoes,
    Section,
    Seed,
    Share,
)
from frpo.config.training import (
    ArmConfig,
    ObjectiveConfig,
    ReferenceConfig,
    RolloutConfig,
    RunLearner,
    Workers,
)


def _without_workers(learner: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in learner.items() if k not in Workers.model_fields}


def _merged_learner(default: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {**_without_workers(default), **own}


def _given(data: dict[str, Any], part: str) -> Any:
    """A section as it was written; no fields where it was left out, or is null."""
    return {} if data.get(part) is None else data[part]


def refuse_workers(data: dict[str, Any]) -> None:
    """Raises ValueError for actors of what has none of its own: every arm and fine-tune is trained by the
    run's ranks."""
    lines = []
    for place, section in dict(_list_sections_without_actors(data)).items():
        for key in Workers.model_fields:
            if isinstance(section, dict) and key in section:
                lines.append(f"{place}.{key}: it is trained by the learner's ranks; set learner.{key}")
    if lines:
        raise ValueError("\n".join(lines))


def _list_sections_without_actors(data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where a recipe may describe a training of an arm or fine-tune, and what is written there."""
    yield "base", data.get("base")
    for part in ("arms", "downstream"):
        items = data.get(part)
        for i, item in enumerate(items if isinstance(items, list | tuple) else ()):
            if not isinstance(item, dict):
                continue
            name = f"{part}.{item.get('name', i)}"
            if part == "downstream":
                yield name, item
            yield f"{name}.learner", item.get("learner")


class EvaluateConfig(Workers):
    completions_per_prompt: Positive = 8
    """Drawn at temperature 1 and top_p 1 from each held-out prompt."""
    max_prompts: Positive | None = None
    """Use at most this many held-out prompts of each task, the first by hash."""
    validate_every: Annotated[Positive, NOTHING] = 50
    """Steps between validations while training."""
    validate_completions: Annotated[Positive, NOTHING] = 2
    """Completions per held-out prompt in a validation."""


class CertifyConfig(Section):
    completions_per_prompt: Annotated[int, Field(ge=2)] = 64
    """Fresh completions drawn from each held-out prompt of a trained task, once the policy is finished."""
    radii: tuple[PositiveFloat, ...] = Field((0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0), min_length=1)
    """Radii certified at once, nats per completion."""
    floor: FiniteFloat = 0.0
    """Least value that the total reward can take; failed rewards count as this."""

    @field_validator("radii")
    @classmethod
    def _in_order(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(radii)) < len(radii):
            raise ValueError("a radius stands twice; give each once")
        return tuple(sorted(radii))


class AttackConfig(Section):
    radii: Annotated[tuple[PositiveFloat, ...], NOTHING] = Field(min_length=1)
    """Each is a stage of its own: KL to the arm's policy at which the attack is steered to end, nats per
    completion."""
    num_steps: Positive
    """Steps of each attack; all else is the arm's learner."""
    mix: dict[str, PositiveFloat] = {}
    """As data.mix, of the attack's batches; empty: data.mix. A task left out is not attacked, and none of the
    KL is spent on it."""


class HarnessConfig(Section):
    tasks: Annotated[tuple[PathText, ...], Content("tasks")] = Field(min_length=1)
    """Tasks of lm-evaluation-harness: names, or paths of task files (.yaml) with local data."""
    limit: Positive | None = None
    """First examples of each task; all by default."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; each task's own number by default."""
    chat: bool = False
    """Apply the chat template."""
    max_tokens: Positive = 2048
    """Longest prompt and answer; what is longer loses its beginning."""
    timeout_s: Annotated[PositiveFloat, NOTHING] = 14400.0
    """Longest wait for all tasks of one policy, seconds."""


class CheckpointConfig(Section):
    every: Positive = 50
    """Steps between checkpoints."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""

    @model_validator(mode="before")
    @classmethod
    def _without_best(cls, data: Any) -> Any:
        """Run folders and recipes of before may say how many of the best to keep, which nothing ever read."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if name != "keep_best"}
        return data


def _arm_of_run(data: dict[str, Any], arm: Any) -> Any:
    """An arm as it was written, with the run's objective and learner below its own fields."""
    if not isinstance(arm, dict):
        return arm
    whole = dict(arm)
    for part, merge in (("objective", merged_objective), ("learner", _merged_learner)):
        default, own = _given(data, part), _given(arm, part)
        if isinstance(default, dict) and isinstance(own, dict):
            whole[part] = merge(default, own)
    return whole


def _task_of_run(data: dict[str, Any], task: Any) -> Any:
    """A downstream rl as it was written, with the run's learner below its own."""
    default = data.get("learner")
    if not isinstance(task, dict) or task.get("kind") != "rl" or not isinstance(default, dict):
        return task
    own = _given(task, "learner")
    if not isinstance(own, dict):
        return task
    default = {name: value for name, value in default.items() if name != "stop_at_reward"}
    return {**task, "learner": _merged_learner(default, own)}


class Config(Section):
    name: Annotated[str, NOTHING] = Field(pattern=NAME)
    """Name of the run; its folder is runs/<name> unless run_dir says otherwise."""
    run_dir: Annotated[Folder | None, NOTHING] = None
    """Run folder."""
    seed: Annotated[Seed, Redoes(("base",))] = 0
    """All randomness derives from it."""
    model: Annotated[ModelConfig, Redoes(("base",))]
    """The policy before training."""
    data: Annotated[DataConfig, Redoes(("base",))]
    """Prompts."""
    rewards: Annotated[tuple[RewardConfig, ...], Redoes(("base",))] = Field(min_length=1)
    """What completions are scored by; the total is made of those that apply to the task."""
    combine: Annotated[Combine, Redoes(("base",))] = "weighted"
    """The total: weighted sum, weighted mean, or product of the rewards."""
    max_failed_rewards: Annotated[Share, NOTHING] = 0.1
    """Share of failed rewards in one step above which the run stops."""
    reward: Annotated[Workers, NOTHING] = Workers()
    """Reward actors."""
    reference: Annotated[ReferenceConfig, NOTHING] = ReferenceConfig()
    """Reference scorers."""
    rollout: Annotated[RolloutConfig, Redoes(("rlhf",))] = RolloutConfig()
    """Rollout workers and sampling."""
    objective: Annotated[ObjectiveConfig, Redoes(("rlhf",), one=True)] = ObjectiveConfig()
    """Default of all arms."""
    learner: Annotated[RunLearner, Redoes(("rlhf",), one=True)]
    """Default of all arms."""
    base: Annotated[BaseConfig | None, Redoes(("base",))] = None
    """Supervised fine-tuning that makes the base model; null takes model.path as it is."""
    arms: Annotated[tuple[ArmConfig, ...], Redoes(("rlhf",), one=True)] = ()
    """Policies to train. Without any the base policy itself is what is certified and fine-tuned."""
    downstream: Annotated[tuple[DownstreamConfig, ...], Redoes(("downstream",), one=True)] = ()
    """Fine-tunes that every arm goes through, each from the arm's policy."""
    certify: Annotated[CertifyConfig | None, Redoes(("certify",))] = None
    """Certificate of every arm: what its reward can fall to inside a KL ball."""
    attack: Annotated[AttackConfig | None, Redoes(("attack",))] = None
    """The worst fine-tunes of every arm that training finds inside a KL ball."""
    harness: Annotated[HarnessConfig | None, Redoes(("harness",))] = None
    """Benchmarks of lm-evaluation-harness (extra `eval`): of the base, of every arm, and after every
    downstream fine-tune."""
    audit: Annotated[AuditConfig | None, NOTHING] = None
    """For `frpo audit` alone: how it varies each of the downstream tasks."""
    evaluate: Annotated[EvaluateConfig, Redoes(("base",))] = EvaluateConfig()
    """Evaluation and validation."""
    checkpoint: Annotated[CheckpointConfig, NOTHING] = CheckpointConfig()
    """Checkpoints of the rlhf and downstream stages."""
    cluster: Annotated[ClusterConfig, NOTHING] = ClusterConfig()
    """Ray."""
    wandb_project: Annotated[str | None, NOTHING] = None
    """Log to this Weights & Biases project too; the key comes from WANDB_API_KEY."""
    mlflow_experiment: Annotated[str | None, NOTHING] = None
    """Log to this MLflow experiment too, on the server or store that MLFLOW_TRACKING_URI names."""

    @model_validator(mode="before")
    @classmethod
    def _arms_inherit(cls, data: Any) -> Any:
        """Give each arm the run's objective and learner with its own fields on top, and each downstream rl
        the learner, but not the reward to stop at: the arm's policy has it when the fine-tune begins."""
        if not isinstance(data, dict):
            return data
        refuse_workers(data)
        inherited = dict(data)
        for part, merge in (("arms", _arm_of_run), ("downstream", _task_of_run)):
            if isinstance(data.get(part), list | tuple):
                inherited[part] = [merge(data, item) for item in data[part]]
        return inherited

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        check_names("arms", [arm.name for arm in self.arms])
        check_names("downstream", [task.name for task in self.downstream])
        if self.attack:
            check_names("attack.radii", [f"{radius:g}" for radius in self.attack.radii])
        check_combination(self.rewards, self.combine)
        if "base" in [arm.name for arm in self.arms]:
            raise ValueError("arms: the name 'base' is taken by the base policy; choose another")
        if self.attack and not self.arms:
            raise ValueError("attack: it trains as an arm does, and there is none; give one, or leave it out")
        checks.check_marks(self)
        checks.check_batches(self)
        check_cards(self)
        checks.check_transport(self)
        checks.check_staleness(self)
        checks.check_nucleus(self)
        check_served(self)
        check_adapters(self)
        for where, loop in checks.loops_of(self):
            checks.check_loop(self, where, loop)
        checks.check_ascent(self)
        checks.check_audit(self)
        checks.check_counts(self)
        return self

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    @property
    def sends_adapters(self) -> bool:
        """Whether engines apply the adapter in training unmerged, and it alone travels."""
        return self.model.lora is not None and self.rollout.lora == "adapter"

    def model_of(self, train: Section) -> ModelConfig:
        """The model as a training takes it: a fine-tune may have adapters of its own."""
        if not isinstance(train, DownstreamSft) or train.lora == "run":
            return self.model
        return self.model.model_copy(update={"lora": train.lora})

    @property
    def served_model(self) -> ModelConfig:
        """The model with the largest adapter that engines are to apply."""
        if not self.sends_adapters:
            return self.model
        models = [self.model, *map(self.model_of, self.downstream)]
        return max(models, key=lambda model: model.lora.rank if model.lora else 0)

    @property
    def parity_tolerance(self) -> float:
        """rollout.parity_tolerance, or that of the dtype; nats."""
        return self.rollout.parity_tolerance or (1e-3 if self.model.dtype == "float32" else 0.1)

    @property
    def num_tokens_limit(self) -> int:
        """Longest sequence that any engine sees, tokens."""
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.harness:
            return max(longest, self.harness.max_tokens)
        return longest
