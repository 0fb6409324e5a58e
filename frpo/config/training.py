"""Sampling, the objective, and the two kinds of training: the rlhf learner and supervised fine-tuning."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from frpo.config.estimators import EstimatorConfig, FrpoEstimator, refuse_fields
from frpo.config.section import NAME, NOTHING, NotNegative, Positive, PositiveFloat, Redoes, Section, Share


class Workers(Section):
    num_workers: Annotated[Positive, NOTHING] = 1
    """Number of actors."""
    num_cpus: Annotated[NotNegative, NOTHING] = 0.25
    """CPUs that Ray reserves for each; a share lets actors that never run at once stand on one core. Under
    rollout.staleness engines and learner do run at once."""
    num_gpus: Annotated[NotNegative, NOTHING] = 0.0
    """GPUs, or a share of one, for each."""
    num_threads: Annotated[Positive, NOTHING] = 1
    """CPU threads of each: more pay off from about 100 million weights on, where roles take turns on the
    cores."""


class ReferenceConfig(Workers):
    share: Annotated[Literal["learner"] | None, NOTHING] = None
    """learner: no actors of its own. The learner's ranks score the policy that they began from, with their
    adapters switched off (needs model.lora): its weights are in memory once."""

    @model_validator(mode="after")
    def _nobodys(self) -> ReferenceConfig:
        asked = [name for name, field in Workers.model_fields.items() if getattr(self, name) != field.default]
        if self.share and asked:
            raise ValueError(
                f"{asked[0]}: with share: {self.share} there are no actors of the reference; leave it out"
            )
        return self


class RolloutConfig(Workers):
    prompts_per_step: Positive = 16
    """Prompts of one step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """k, completions drawn per prompt."""
    max_new_tokens: Annotated[Positive, Redoes(("base",))] = 256
    """Length limit of a completion."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the learner and the reference use the same."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus. Below 1 the engines' log-probs are of the nucleus: the ratio of the policy gradient is biased
    (its mean is the kept mass). The KL of a step is then that of what was drawn, by the log-probs of the
    whole distribution; target_kl and attack, which steer to a KL of the policy's own, are refused."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Redoes(("base",))] = ()
    """Strings that end a completion; rewards see the text before them."""
    staleness: Annotated[int, Field(ge=0, le=64)] = 0
    """How many updates older than the learner's policy the one that draws may be. 0: drawing and updating
    take turns. From 1 on drawing goes on while the learner updates, and each token is weighed by the log-prob
    that it was drawn with (objective.importance); a run is then no longer the same to the bit each time."""
    in_flight: bool = True
    """With staleness: engines take new weights between two tokens, and completions that are under way go on
    under them. false: they finish all they have begun first."""
    tensor_parallel: Annotated[Positive, NOTHING] = 1
    """GPUs of one vLLM engine."""
    max_num_seqs: Annotated[Positive, NOTHING] = 64
    """Sequences decoded at once."""
    gpu_memory_utilization: Annotated[Share, NOTHING] = 0.9
    """Share of GPU memory for vLLM's weights and KV cache."""
    kv_cache_gib: Annotated[Positive, NOTHING] = 1
    """KV cache on the CPU, and on a GPU under model.deterministic, GiB; else a GPU's is what
    gpu_memory_utilization leaves."""
    enforce_eager: Annotated[bool, NOTHING] = False
    """On a GPU, start engines without compiling and CUDA graphs: sooner by a minute or more, and slower at
    each token. For short runs."""
    sleep: Annotated[bool, NOTHING] = False
    """Free vLLM's GPU memory while the learner updates (both on one GPU)."""
    transport: Annotated[Literal["object_store", "process_group"], NOTHING] = "object_store"
    """How weights reach the engines: Ray's object store, or a broadcast (gloo, NCCL)."""
    lora: Annotated[Literal["adapter", "merged"], NOTHING] = "adapter"
    """With model.lora. adapter: the adapter alone travels, through the object store, and vLLM applies it
    unmerged. merged: all weights travel, with the adapter in them; only for float32, since most of an early
    update is lost between the numbers of bfloat16. Generation is faster (1.45 times on a CPU)."""
    parity_every: Annotated[Positive | None, NOTHING] = None
    """Steps between checks that the engines run the learner's weights; always checked at the start. null: 50,
    and 5 with staleness, where max_mismatch_kl has next to nothing to measure."""
    parity_tolerance: Annotated[PositiveFloat | None, NOTHING] = None
    """Mean difference of a token's log-prob in that check, nats; null: 0.001 in float32, and 0.1 in bfloat16,
    where two implementations of the same weights are 0.03 to 0.07 apart."""
    max_mismatch_kl: Annotated[PositiveFloat, NOTHING] = 0.05
    """A step whose KL(engine || learner) per token is above this stops the run, nats; what top_p adds to it
    is not counted. Measured on groups that were drawn by the policy that is updated: with staleness on few,
    or none."""

    @property
    def steps_between_parity(self) -> int:
        return self.parity_every or (5 if self.staleness else 50)

    @property
    def mismatch_limit(self) -> float:
        """max_mismatch_kl and the most that a nucleus adds: its log-probs are up to -log top_p larger than
        the policy's (k3 of that)."""
        return self.max_mismatch_kl + self.top_p - 1 - math.log(self.top_p)


class GateConfig(Section):
    tasks: tuple[str, ...] = Field(min_length=1)
    """Protected tasks: those in which a failure is known by its reward."""
    threshold: float = 0.5
    """A completion with a lower reward has failed."""


class ObjectiveConfig(Section):
    estimator: EstimatorConfig = FrpoEstimator()
    """How rewards become advantages."""
    beta: NotNegative = 0.02
    """Weight of the KL penalty to the reference; 0 starts no reference actor."""
    target_kl: PositiveFloat | None = None
    """Steer beta, from its given value, so that the run ends at this KL to the reference, nats per
    completion. Under rollout.staleness it is steered by what older policies drew, and follows later."""
    penalty: Literal["k3", "token", "reverse"] = "reverse"
    """k3: in the loss, per token, mode covering (the GRPO paper's, and the released FRPO code's). token: k3
    times the importance ratio, the gradient of each token's own KL(policy || reference), blind to what the
    token does to later ones (TRL's default since 1.16). reverse: the gradient of KL(policy || reference),
    per completion."""
    gate: GateConfig | None = None
    """Let failures on some tasks pay no penalty, which would pull them back."""
    beta_of: dict[str, NotNegative] = {}
    """Factor on beta, by task; 1 where a task has none."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token (PPO) or per sequence (GSPO: geometric mean)."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO clip below 1."""
    clip_high: PositiveFloat = 0.2
    """PPO clip above 1."""
    importance: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """What becomes of an importance weight, learner over the policy that drew, above importance_cap: it is
    cut at the cap, or what it weighs is left out. Of each token, or of a whole completion (the product)."""
    importance_cap: PositiveFloat = 2.0
    """Largest importance weight."""
    aggregation: Literal["completion", "token", "sum"] = "sum"
    """completion: mean over its tokens, then over completions; token: over all tokens; sum: over a constant
    length (the gradient of the objective)."""
    cut: Literal["keep", "mask", "penalise"] = "keep"
    """Completions ended by the length limit: train on them, leave them out, or lower their reward by
    cut_penalty."""
    cut_penalty: NotNegative = 0.5
    """Subtracted from the reward of a cut completion under cut: penalise."""

    @property
    def penalised(self) -> bool:
        """Whether it needs the reference."""
        return self.beta > 0

    @property
    def wants_divergence(self) -> bool:
        """Whether the penalty needs each completion's log-ratio to the reference before the update."""
        return self.penalised and (self.penalty == "reverse" or self.gate is not None)

    @property
    def penalised_tasks(self) -> dict[str, tuple[str, ...]]:
        """The tasks that are named, by the field that names them."""
        gated = self.gate.tasks if self.gate else ()
        return {"gate.tasks": gated, "beta_of": tuple(self.beta_of)}

    @model_validator(mode="before")
    @classmethod
    def _of_the_estimator(cls, data: Any) -> Any:
        """Fields that older recipes have here are said to belong to the estimator."""
        if not isinstance(data, dict):
            return data
        moved = [name for name in data if name in MOVED]
        refuse_fields(cls, data, {name: _where_now(name, data[name]) for name in moved})
        return data

    @model_validator(mode="after")
    def _steered(self) -> ObjectiveConfig:
        if self.target_kl is not None and self.beta == 0:
            raise ValueError(
                f"target_kl: {self.target_kl:g} is reached by steering beta, which is 0; give a beta > 0 to "
                "start from"
            )
        return self

    @model_validator(mode="after")
    def _gated(self) -> ObjectiveConfig:
        for field, tasks in self.penalised_tasks.items():
            if tasks and self.beta == 0:
                raise ValueError(
                    f"{field}: {', '.join(tasks)} would have a penalty of their own, and beta is 0; give a "
                    "beta > 0, or leave it out"
                )
        return self


MOVED = {
    "method": "", "normalize_std": "grpo", "lam": "frpo", "rho": "frpo", "jackknife": "frpo", "scale": "frpo",
}  # fmt: skip
"""Fields that stood in the objective itself once, and the kind of estimator that has them now."""


def _where_now(name: str, value: Any) -> str:
    if name == "method":
        return f"it is the kind of the estimator; write objective.estimator: {{kind: {value}}}"
    text = json.dumps(value).strip('"')
    return (
        f"it is a field of the estimator; write objective.estimator: {{kind: {MOVED[name]}, {name}: {text}}}"
    )


class TrainConfig(Section):
    """What the learner and the fine-tune workers share."""

    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    final_share: Share = 0.0
    """Learning rate at the end as a share of the peak (linear, cosine)."""
    warmup_share: Share = 0.0
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    grad_clip: PositiveFloat = 1.0
    """L2 norm at which gradients are clipped."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights: the policy at the end is this average over its
    updates. What draws and is measured before the end is the policy in training."""
    sam: PositiveFloat | None = None
    """Sharpness-aware minimisation (arXiv 2010.01412): each update takes its gradient where the loss is
    higher, this far up its slope (L2 distance over all trained weights). A forward and a backward pass
    more."""
    zero_stage: Annotated[Literal[1, 2, 3], NOTHING] = 1
    """DeepSpeed ZeRO stage; in bfloat16 1 runs as 2, which sums gradients in float32."""
    offload: Annotated[Literal["none", "optimizer", "all"], NOTHING] = "none"
    """ZeRO offload to host memory (GPU)."""
    micro_batch_tokens: Annotated[Positive, NOTHING] = 8192
    """Padded tokens in one forward and backward pass of one rank."""

    @model_validator(mode="after")
    def _whole_weights(self) -> TrainConfig:
        for name in ("ema", "sam"):
            value = getattr(self, name)
            if value is not None and self.zero_stage == 3:
                raise ValueError(
                    f"{name}: {value:g} needs each rank's weights whole, and zero_stage is 3; take 1 or 2"
                )
        return self


class LearnerConfig(TrainConfig):
    num_steps: Positive
    """Steps of the rlhf stage; the most, with stop_at_reward."""
    stop_at_reward: float | None = None
    """End the stage once the mean reward of the last 5 batches is this high: arms stopped at an equal
    reward."""
    updates_per_batch: Positive = 1
    """Optimiser updates on each batch; above 1 the PPO clip is at work."""

    @property
    def wants_old(self) -> bool:
        """Whether the policy moves between the first and the last pass over a batch."""
        return self.updates_per_batch > 1 or self.sam is not None

    @model_validator(mode="after")
    def _known_end(self) -> LearnerConfig:
        if self.ema is not None and self.stop_at_reward is not None:
            raise ValueError(
                f"ema: {self.ema:g} takes effect after the last step, which stop_at_reward "
                f"({self.stop_at_reward:g}) leaves open; leave one of them out"
            )
        return self


class RunLearner(LearnerConfig, Workers):
    """The learner of the run: its ranks train every arm, and its bundles hold the ranks of every
    fine-tune."""


class ArmConfig(Section):
    name: Annotated[str, NOTHING] = Field(pattern=NAME)
    """Name in metrics, folders and reports."""
    objective: ObjectiveConfig
    """Fields that differ from the run's objective."""
    learner: LearnerConfig
    """Fields that differ from the run's learner."""
