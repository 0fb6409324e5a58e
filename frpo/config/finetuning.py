"""Fine-tunes: the one that makes the base model, and those that every arm goes through."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from frpo.config.data import DatasetConfig
from frpo.config.estimators import GrpoEstimator
from frpo.config.model import LoraConfig
from frpo.config.section import NAME, NOTHING, NotNegative, Positive, PositiveFloat, Section, Share
from frpo.config.training import LearnerConfig, ObjectiveConfig, TrainConfig


class FinetuneConfig(TrainConfig):
    num_steps: Positive
    """Optimiser updates."""
    batch_size: Positive = 32
    """Examples of one update, over all ranks."""
    max_tokens: Positive = 512
    """Longer examples (prompt and completion) are dropped and counted, never cut."""
    full_sequence: bool = False
    """Train on prompt tokens too."""


class BaseConfig(FinetuneConfig):
    data: tuple[DatasetConfig, ...]
    """Examples (prompt and completion) that make the base model."""
    in_order: bool = False
    """Take rows in file order instead of shuffling each epoch."""


OWN_PROMPTS = 512
"""Training prompts that an arm's own completions are drawn from before a fine-tune, at most."""


class DownstreamSft(FinetuneConfig):
    kind: Literal["sft"] = "sft"
    """Supervised fine-tuning."""
    name: Annotated[str, NOTHING] = Field(pattern=NAME)
    """Name in metrics and reports."""
    data: tuple[DatasetConfig, ...]
    """Examples to fine-tune on."""
    mix: dict[str, PositiveFloat] = {}
    """Weight of each task of `data` in a batch; empty: by number of rows."""
    heldout: tuple[DatasetConfig, ...] = ()
    """Examples to measure the downstream loss on."""
    marks: tuple[Positive, ...] = ()
    """Steps at which the policy is evaluated besides the last."""
    lora: LoraConfig | Literal["run"] | None = "run"
    """Adapters of this fine-tune; run: as model.lora says; null: train all weights. In bfloat16 an adapter
    stands on the arm's own, so that both or none are asked for."""
    replay: Share = 0.0
    """Share of each batch that are good completions of the arm's own, against forgetting. Before the first
    step the arm's policy draws rollout.group_size completions from each of its training prompts, 512 at most;
    of a prompt the best is kept, if its reward is at least the mean of its task."""
    kl_to_policy: NotNegative = 0.0
    """Weight in the loss of KL(arm's policy || fine-tuned policy), nats per token, estimated on completions
    that the arm's policy drew as for replay, good and bad: as many in each update as examples, which takes
    about twice as long."""
    interpolate: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """After the last update the policies that lie at these shares of the way from the arm's weights to the
    fine-tuned ones are tried on the held-out examples. The one nearest to the arm that keeps 90 % of the
    fine-tune's gain in held-out loss is the stage's policy; the fine-tuned one where none does."""

    @property
    def sources(self) -> tuple[DatasetConfig, ...]:
        return self.data + self.heldout

    @property
    def num_replayed(self) -> int:
        """Completions of the arm's own in a batch."""
        return round(self.replay * self.batch_size)

    @property
    def draws_own(self) -> bool:
        """Whether it needs completions of the arm's own."""
        return self.replay > 0 or self.kl_to_policy > 0

    @model_validator(mode="after")
    def _both_in_a_batch(self) -> DownstreamSft:
        if self.replay and not 0 < self.num_replayed < self.batch_size:
            which = "examples" if self.num_replayed else "completions of the arm's own"
            raise ValueError(
                f"replay: {self.replay:g} of a batch of {self.batch_size} leaves no {which} in it; give a "
                f"share between {1 / self.batch_size:.2g} and {1 - 1 / self.batch_size:.2g}"
            )
        return self

    @model_validator(mode="after")
    def _tried_on_something(self) -> DownstreamSft:
        if self.interpolate and not self.heldout:
            raise ValueError(
                f"interpolate: {len(self.interpolate)} shares are chosen among by the loss on held-out "
                "examples, and there are none; give heldout, or leave interpolate out"
            )
        if self.interpolate and self.zero_stage == 3:
            raise ValueError(
                "interpolate: it needs each rank's weights whole, and zero_stage is 3; take 1 or 2"
            )
        return self


class DownstreamRl(Section):
    kind: Literal["rl"]
    """Reinforcement learning by the loop of the rlhf stage."""
    name: Annotated[str, NOTHING] = Field(pattern=NAME)
    """Name in metrics and reports."""
    data: tuple[DatasetConfig, ...] = Field(min_length=1)
    """Prompts; the rewards that apply to their tasks are trained on."""
    objective: ObjectiveConfig = ObjectiveConfig(estimator=GrpoEstimator(), beta=0.0)
    """Its penalty, if any, is to the arm's policy."""
    learner: LearnerConfig
    """Fields that differ from the run's learner."""
    marks: tuple[Positive, ...] = ()
    """Steps at which the policy is evaluated besides the last."""

    @property
    def sources(self) -> tuple[DatasetConfig, ...]:
        return self.data

    @property
    def num_steps(self) -> int:
        return self.learner.num_steps


def _kind(value: Any) -> str:
    return str(value.get("kind", "sft") if isinstance(value, dict) else getattr(value, "kind", "sft"))


DownstreamConfig = Annotated[
    Annotated[DownstreamSft, Tag("sft")] | Annotated[DownstreamRl, Tag("rl")], Discriminator(_kind)
]
