"""The configuration: one frozen pydantic tree. Imports no ML library; `frpo.recipe` reads it from YAML.

Every field has a docstring, which `frpo config` prints beside its value. What one field alone can tell is checked here;
what needs the disk or the cluster is checked in `frpo.preflight`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A mistake that the user can mend: the message names the field, the value and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Positive = 16
    """Scale: the update is alpha / rank * B A."""
    dropout: Share = 0.0
    """Dropout on the adapters' input while training."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Module names that get an adapter."""


class ModelConfig(Section):
    path: str
    """Hugging Face folder or hub name of the base policy (the reference), or testbed:model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; bfloat16 is for GPUs (6 to 35 times slower than float32 on AVX2)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of the learner and the scorers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 28 % more time."""
    lora: LoraConfig | None = None
    """Train adapters by peft; null trains all weights."""


class DatasetConfig(Section):
    path: str
    """.jsonl, .csv or .parquet file (.gz too), a Hugging Face data set folder or hub name, or testbed:<name>."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    prompt: str = "prompt"
    """Column with the prompt: a string, or chat messages (role, content)."""
    completion: str | None = None
    """Column with the completion, for supervised fine-tuning; None for prompts alone."""
    completion_texts: tuple[str, ...] = ()
    """Fixed completions instead of a column: each row takes one, chosen by a hash of its prompt."""
    task: str | None = None
    """Label of every row; it routes rewards and mixes data sets."""
    task_column: str | None = None
    """Column to take the label from instead."""
    where: dict[str, str] = {}
    """Keep only rows whose column equals the value."""
    heldout_share: Share = 0.0
    """Share of rows, by a hash of the prompt, that is kept for evaluation and never trained on."""
    part: Literal["all", "train", "heldout"] = "all"
    """Which side of that split to read."""
    chat: bool = False
    """Wrap string prompts as a user message and apply the tokenizer's chat template."""
    limit: Positive | None = None
    """Read at most this many rows."""

    @model_validator(mode="after")
    def _one_task(self) -> DatasetConfig:
        if (self.task is None) == (self.task_column is None):
            raise ValueError("give exactly one of task (a label) and task_column (a column that holds it)")
        if self.completion and self.completion_texts:
            raise ValueError("give completion (a column) or completion_texts (fixed answers), not both")
        if self.part != "all" and self.heldout_share == 0:
            raise ValueError(f"part: {self.part} needs heldout_share > 0")
        return self


class DataConfig(Section):
    train: tuple[DatasetConfig, ...]
    """Prompts of the rlhf stage."""
    heldout: tuple[DatasetConfig, ...] = ()
    """Prompts of validation and evaluation; never trained on."""
    mix: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Weight of each task in a batch; empty: by number of rows."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are dropped and counted, never cut."""


class FunctionReward(Section):
    kind: Literal["function"]
    """A Python function."""
    name: str
    """Name in metrics and reports."""
    function: str
    """module:function, or file.py:function: f(prompts, completions, **columns) -> list of float or None."""
    arguments: dict[str, Any] = {}
    """Keyword arguments given on every call."""
    weight: float = 1.0
    """Factor in the total."""
    tasks: tuple[str, ...] = ()
    """Tasks it applies to; empty: all."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A call that takes longer is a failed reward."""


class ModelReward(Section):
    kind: Literal["model"]
    """A sequence-classification model with one label."""
    name: str
    """Name in metrics and reports."""
    path: str
    """Hugging Face folder or hub name."""
    weight: float = 1.0
    """Factor in the total."""
    tasks: tuple[str, ...] = ()
    """Tasks it applies to; empty: all."""
    squash: Literal["none", "sigmoid"] = "sigmoid"
    """sigmoid maps the logit to [0, 1], which the certificate needs."""
    max_tokens: Positive = 1024
    """Prompt and completion together; longer texts lose their beginning."""
    batch_tokens: Positive = 8192
    """Padded tokens in one forward pass."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A call that takes longer is a failed reward."""


RewardConfig = Annotated[FunctionReward | ModelReward, Field(discriminator="kind")]


class Workers(Section):
    num_workers: Positive = 1
    """Number of actors."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    """CPUs that Ray reserves for each; a share lets actors that never run at once stand on one core."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, or a share of one, for each."""


class RolloutConfig(Workers):
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    """CPUs that Ray reserves for each."""
    prompts_per_step: Positive = 16
    """Prompts of one step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """k, completions drawn per prompt."""
    max_new_tokens: Positive = 256
    """Length limit of a completion."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the learner and the reference use the same."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; below 1 the ratio of the policy gradient is biased (its mean is the kept mass)."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    tensor_parallel: Positive = 1
    """GPUs of one vLLM engine."""
    max_num_seqs: Positive = 64
    """Sequences decoded at once."""
    gpu_memory_utilization: Share = 0.9
    """Share of GPU memory for vLLM's weights and KV cache."""
    kv_cache_gib: Positive = 1
    """KV cache on the CPU, GiB."""
    sleep: bool = False
    """Free vLLM's GPU memory while the learner updates (both on one GPU)."""
    transport: Literal["object_store", "process_group"] = "object_store"
    """How weights reach the engines: Ray's object store, or a broadcast (gloo, NCCL)."""
    parity_every: Positive = 50
    """Steps between checks that the engines run the learner's weights; always checked at the start."""
    parity_tolerance: Annotated[float, Field(gt=0)] = 1e-2
    """Largest difference of a token's log-prob in that check, nats."""
    max_mismatch_kl: Annotated[float, Field(gt=0)] = 0.05
    """A step whose KL(engine || learner) per token is above this stops the run, nats."""


class ObjectiveConfig(Section):
    method: Literal["grpo", "rloo", "frpo"] = "frpo"
    """Advantage estimator."""
    normalize_std: bool = False
    """grpo: divide by the group's standard deviation."""
    lam: Annotated[float, Field(gt=0)] = 2.0
    """frpo: temperature of the robust objective, reward units; large is GRPO, small looks at the worst completion."""
    jackknife: bool = True
    """frpo: remove the leading bias of the group estimate (equation 4.3)."""
    scale: Literal["exact", "unit", "code"] = "code"
    """frpo: factor of the advantage: lam, 1, or max(lam, 1) as in the released code."""
    beta: Annotated[float, Field(ge=0)] = 0.02
    """Weight of the KL penalty to the reference; 0 starts no reference actor."""
    penalty: Literal["k3", "reverse"] = "reverse"
    """k3: in the loss, per token, mode covering (what GRPO does). reverse: the gradient of KL(policy || reference), per completion."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token (PPO) or per sequence (GSPO: geometric mean)."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO clip below 1."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """PPO clip above 1."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Truncation of the engine/learner importance weight."""
    aggregation: Literal["completion", "token", "sum"] = "sum"
    """completion: mean over its tokens, then over completions; token: over all tokens; sum: over a constant length (the gradient of the objective)."""
    cut: Literal["keep", "mask", "penalise"] = "keep"
    """Completions ended by the length limit: train on them, leave them out, or lower their reward by cut_penalty."""
    cut_penalty: Annotated[float, Field(ge=0)] = 0.5
    """Subtracted from the reward of a cut completion under cut: penalise."""


class TrainConfig(Workers):
    """What the learner and the fine-tune workers share."""

    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    """CPUs that Ray reserves for each rank."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    final_share: Share = 0.0
    """Learning rate at the end as a share of the peak (linear, cosine)."""
    warmup_share: Share = 0.0
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm at which gradients are clipped."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """ZeRO offload to host memory (GPU)."""
    micro_batch_tokens: Positive = 8192
    """Padded tokens in one forward and backward pass of one rank."""


class LearnerConfig(TrainConfig):
    num_steps: Positive
    """Steps of the rlhf stage."""
    updates_per_batch: Positive = 1
    """Optimiser updates on each batch; above 1 the PPO clip is at work."""


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


class DownstreamConfig(FinetuneConfig):
    name: str
    """Name in metrics and reports."""
    data: tuple[DatasetConfig, ...]
    """Examples to fine-tune on."""
    heldout: tuple[DatasetConfig, ...] = ()
    """Examples to measure the downstream loss on."""
    marks: tuple[Positive, ...] = ()
    """Steps at which the policy is evaluated besides the last."""


class ArmConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in metrics, folders and reports."""
    objective: ObjectiveConfig
    """Fields that differ from the run's objective."""
    learner: LearnerConfig
    """Fields that differ from the run's learner."""


class EvaluateConfig(Workers):
    completions_per_prompt: Positive = 8
    """Drawn at temperature 1 and top_p 1 from each held-out prompt."""
    max_prompts: Positive | None = None
    """Use at most this many held-out prompts of each task, the first by hash."""
    validate_every: Positive = 50
    """Steps between validations while training."""
    validate_completions: Positive = 2
    """Completions per held-out prompt in a validation."""
    num_samples: Positive = 24
    """Completions kept for the report's sample table."""


class CheckpointConfig(Section):
    every: Positive = 50
    """Steps between checkpoints."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Checkpoints of best validation reward kept besides."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address; null joins the job's cluster (RAY_ADDRESS) or starts one on this machine."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Placement of the actors' bundles over nodes."""
    object_store_gib: Annotated[float, Field(gt=0)] = 1.0
    """Object store of a cluster started here, GiB."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for placement and for actors to start."""
    call_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Longest wait for one call of an actor."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts of a rollout, reward, reference or evaluation actor within a run."""


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs/<name> unless run_dir says otherwise."""
    run_dir: Path | None = None
    """Run folder."""
    seed: int = 0
    """All randomness derives from it."""
    model: ModelConfig
    """The policy before training."""
    data: DataConfig
    """Prompts."""
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    """What completions are scored by; the total is the weighted sum of those that apply."""
    max_failed_rewards: Share = 0.1
    """Share of failed rewards in one step above which the run stops."""
    reward: Workers = Workers()
    """Reward actors."""
    reference: Workers = Workers()
    """Reference scorers."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollout workers and sampling."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Default of all arms."""
    learner: LearnerConfig
    """Default of all arms."""
    base: BaseConfig | None = None
    """Supervised fine-tuning that makes the base model; null takes model.path as it is."""
    arms: tuple[ArmConfig, ...] = Field(min_length=1)
    """Policies to train."""
    downstream: tuple[DownstreamConfig, ...] = ()
    """Fine-tunes that every arm goes through, each from the arm's policy."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation and validation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints of the rlhf and downstream stages."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project too; the key comes from WANDB_API_KEY."""

    @model_validator(mode="before")
    @classmethod
    def _arms_inherit(cls, data: Any) -> Any:
        """Give each arm the run's objective and learner with its own fields on top."""
        if not isinstance(data, dict) or not isinstance(data.get("arms"), list | tuple):
            return data
        arms = []
        for arm in data["arms"]:
            if isinstance(arm, dict):
                arm = dict(arm)
                for part in ("objective", "learner"):
                    default, own = data.get(part) or {}, arm.get(part) or {}
                    if isinstance(default, dict) and isinstance(own, dict):
                        arm[part] = {**default, **own}
            arms.append(arm)
        return {**data, "arms": arms}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for where, names in (
            ("arms", [a.name for a in self.arms]),
            ("downstream", [d.name for d in self.downstream]),
            ("rewards", [r.name for r in self.rewards]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{where}: the name {twice[0]!r} stands twice; give each its own")
        if "base" in [a.name for a in self.arms]:
            raise ValueError("arms: the name 'base' is taken by the base policy; choose another")
        for d in self.downstream:
            late = [m for m in d.marks if m > d.num_steps]
            if late:
                raise ValueError(f"downstream.{d.name}.marks: {late[0]} is after the last step {d.num_steps}; lower it")
            if any(not s.completion and not s.completion_texts for s in d.data + d.heldout):
                raise ValueError(f"downstream.{d.name}.data: fine-tuning needs completion or completion_texts")
        if self.base and any(not s.completion and not s.completion_texts for s in self.base.data):
            raise ValueError("base.data: fine-tuning needs completion or completion_texts")
        for where, batch, ranks in (
            ("learner", self.rollout.prompts_per_step * self.rollout.group_size, self.learner.num_workers),
            *((f"downstream.{d.name}", d.batch_size, d.num_workers) for d in self.downstream),
        ):
            if batch < ranks:
                raise ValueError(f"{where}.num_workers: {ranks} ranks share a batch of {batch}; use at most {batch}")
        if self.rollout.sleep and (self.rollout.num_gpus == 0 or self.rollout.transport != "object_store" or self.learner.zero_stage != 3):
            raise ValueError("rollout.sleep: it needs rollout.num_gpus > 0, rollout.transport: object_store and learner.zero_stage: 3")
        if self.rollout.tensor_parallel > 1 and self.rollout.transport == "object_store":
            raise ValueError("rollout.tensor_parallel: above 1 it needs rollout.transport: process_group")
        limit = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.learner.micro_batch_tokens < limit:
            raise ValueError(
                f"learner.micro_batch_tokens: {self.learner.micro_batch_tokens} is less than one sequence of "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {limit}; raise it"
            )
        return self

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    @property
    def num_tokens_limit(self) -> int:
        """Longest sequence that any engine sees, tokens."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens
