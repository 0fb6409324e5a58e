"""What the driver and the learner measure in a step. Frozen records; metrics.jsonl holds them as they are.

Rewards are in reward units, log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GateStats:
    """KL(policy || reference) of the protected tasks by the chain rule, over successes S and failures F,
    means over groups: kl_outcome + kl_success + kl_failure is their mean log-ratio. From a group's own draws:
    a side with a single one adds nothing of its own, so that both sides are low where few are drawn."""

    failing_share: float
    """P(F), completions below the threshold."""
    kl_outcome: float
    """KL of the Bernoullis: how much likelier the policy succeeds than the reference, nats."""
    kl_success: float
    """P(S) KL(policy given S || reference given S), nats: what the gate lets stand."""
    kl_failure: float
    """P(F) KL(policy given F || reference given F), nats."""


@dataclass(frozen=True)
class BatchStats:
    """What one step drew, before the update. Rewards in reward units, over completions that have one."""

    reward: float
    reward_std: float
    """Spread over all completions of the batch."""
    group_std: float
    """Mean over groups of the spread inside a group."""
    equal_groups: float
    """Share of groups whose rewards are all equal: no gradient comes from them."""
    advantage_std: float
    non_monotone: float
    """Share of groups in which a higher reward got a lower advantage (small lam with the jackknife)."""
    beta: float
    """Weight of the KL penalty in this step, where a task has no other."""
    gate: GateStats | None
    """Of the tasks that a gate protects; None without one."""
    lam: float | None
    """Temperature of this step; None for estimators that have none."""
    radius: float | None
    """Mean over groups of KL(tilted policy || policy) at this lam on the batch, nats."""
    effective_samples: float | None
    """Mean over groups of 1 / sum p^2 of the tilted policy, completions: near 1 the gradient rests on one."""
    length: float
    """Mean completion length, tokens."""
    cut_share: float
    """Share of completions ended by the length limit."""
    failed_rewards: int
    dropped_groups: int
    """Left with fewer than two completions that train."""
    num_prompts: int
    num_completions: int
    num_tokens: int
    """Completion tokens drawn."""
    staleness: float
    """Updates that the policy had seen since it drew a token, mean over tokens."""
    max_staleness: int
    reward_parts: Mapping[str, float]
    """Mean of each reward part over the completions that have it."""
    reward_tasks: Mapping[str, float]
    """Mean reward of each task in the batch."""
    errors: tuple[str, ...]
    """The first different reasons why rewards failed."""


@dataclass(frozen=True)
class UpdateStats:
    """What the learner measured in one step, over all ranks and micro-batches."""

    loss: float
    penalty: float
    """Mean k3 estimate of KL(policy || reference), nats per token; 0 without a reference."""
    grad_norm: float
    """L2, before clipping; last update of the step."""
    learning_rate: float
    entropy: float
    """Mean over completion tokens, nats."""
    clip_share: float
    """Share of completion tokens whose ratio was clipped."""
    capped_share: float
    """Share of completion tokens whose importance weight was cut at the cap, or that it left out."""
    mismatch_kl: float | None
    """k3 estimate of KL(engine || learner) per token, nats, before the first update, over the groups that the
    engine drew by the learner's own policy version alone: 0 for identical policies. None where there are
    none."""
    stale_kl: float | None
    """The same over all others, which older versions drew or began, and which differ from the learner's on
    purpose; None where there are none."""
    kl: float | None
    """Mean over the completions that train of log policy - log reference before the update, nats; None
    without a reference. The policy's are the learner's: an engine's differ from them, in bfloat16 by 1 to 2
    nats in 1,000 tokens. Of a nucleus (top_p below 1), and of what older policies drew, it is the mean over
    that, not the policy's own."""
    num_computed_tokens: int
    """Prompts included: once for all completions that share its computation."""
    learner_s: float
    """Seconds that the learner's first rank took."""


@dataclass(frozen=True)
class FinetuneStats:
    loss: float
    """Mean negative log-likelihood of the batch, what is replayed in it included, nats per completion
    token."""
    grad_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float
    kl: float | None = None
    """Before the update: estimate of KL(policy that training began from || policy), nats per token; None
    where the loss has none of it."""


@dataclass(frozen=True)
class Phases:
    """Where the time of a step went, seconds of wall clock unless said otherwise."""

    generate_s: float
    score_s: float
    """Waiting for rewards and log-probs after the last group had arrived."""
    waiting_rewards: int
    """Groups whose rewards were still missing then: the queue of the reward workers."""
    waiting_reference: int
    """Groups whose reference log-probs were still missing then."""
    update_s: float
    """Advantages and the learner's update."""
    publish_s: float
    step_s: float
    """The whole step."""
    driver_s: float
    """CPU time of the driver's process: its share of the work, which no other actor waits for but in part."""

    @property
    def other_s(self) -> float:
        """What none of the phases accounts for."""
        return self.step_s - self.generate_s - self.score_s - self.update_s - self.publish_s


@dataclass(frozen=True)
class Times:
    """When a step did what: seconds since its loop began, which is 0 again where a run was resumed. How long
    each phase took stands in `Phases`."""

    generate_at: float
    """The step began: it waits for its groups."""
    score_at: float
    update_at: float
    publish_at: float
    drawn: tuple[tuple[float, float], ...]
    """(from, to), in order: while at least one of the groups that it trains on was being drawn. The first was
    begun at `drawn[0][0]`, the last was there at `drawn[-1][1]`. All before `generate_at` where the loop was
    far enough ahead; 0 for what was drawn before the loop began."""
    groups_ahead: int
    """Groups of these that were there when the step began."""


@dataclass(frozen=True)
class StepMetrics:
    """One row of metrics.jsonl in a stage that runs the loop."""

    step: int
    policy_version: int
    """After the step."""
    batch: BatchStats
    update: UpdateStats
    phases: Phases
    times: Times
    published_bytes: int
    """Weights that one engine was sent at the end of the step."""
