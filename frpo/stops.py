"""What ends a run at once, before a checkpoint takes the place of a good one: rewards that fail, numbers that
are none, and engines that do not run the learner's policy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from frpo.config import Config
from frpo.stats import BatchStats, FinetuneStats, UpdateStats
from frpo.types import Floats, RolloutBatch

SMALLER = "bring the values near 1 (rewards.<name>.scale)"
BROKEN = (
    "the weights or the activations left the range of numbers; look at the weights of model.path, or take "
    "model.dtype: float32"
)


class RunStopped(RuntimeError):
    """The run may not go on. The message names the step, the number, what it means and what to change."""


def stop_if_not_finite(where: str, numbers: Mapping[str, float | None], remedy: str) -> None:
    """`numbers` by name; None was not measured."""
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise RunStopped(f"{where}: {name} is {value}: {remedy}")


def stop_if_rewards_fail(config: Config, stats: BatchStats, step: int) -> None:
    """More of them than max_failed_rewards, or so many that nothing is left to train on."""
    share = stats.failed_rewards / stats.num_completions
    if share > config.max_failed_rewards or stats.dropped_groups == stats.num_prompts:
        why = "; ".join(stats.errors) or _say_nothing_left(config, stats)
        raise RunStopped(
            f"step {step}: {stats.failed_rewards} of {stats.num_completions} rewards failed "
            f"(max_failed_rewards = {config.max_failed_rewards:g}): {why}"
        )


def _say_nothing_left(config: Config, stats: BatchStats) -> str:
    return (
        f"every group was left with fewer than two completions that train; {stats.cut_share:.0%} of all are "
        f"cut at rollout.max_new_tokens = {config.rollout.max_new_tokens}: raise it, or set objective.cut to "
        "keep"
    )


def stop_if_batch_is_broken(batch: RolloutBatch, stats: BatchStats, step: int) -> None:
    """Before the update: the learner's weights are still whole."""
    where = f"step {step}"
    for who, logprobs in (
        ("engine", batch.behaviour),
        ("learner", batch.old),
        ("reference", batch.reference),
    ):
        if logprobs is not None:
            stop_if_not_finite(where, {f"a log-prob of the {who}": float(logprobs.sum())}, BROKEN)
    numbers = {
        "the mean reward": stats.reward,
        "an advantage": float(np.abs(batch.advantages).max(initial=0.0)),
    }
    stop_if_not_finite(where, numbers, f"rewards are too large to add up; {SMALLER}")


def stop_if_update_is_broken(config: Config, update: UpdateStats, step: int) -> None:
    """After the update and before anything is published, logged or saved."""
    numbers = {
        "the loss": update.loss,
        "the penalty": update.penalty,
        "the entropy": update.entropy,
        "the gradient norm": update.grad_norm,
    }
    stop_if_not_finite(f"step {step}", numbers, say_too_fast(update.learning_rate))
    mismatch = update.mismatch_kl
    if mismatch is not None and not mismatch <= config.rollout.mismatch_limit:
        raise RunStopped(
            f"step {step}: KL(engine || learner) is {mismatch:.3g} nats per token, above "
            f"rollout.max_mismatch_kl = {config.rollout.max_mismatch_kl:g}: the engines do not sample the "
            "learner's policy"
        )


def stop_if_finetune_is_broken(stats: FinetuneStats, step: int) -> None:
    numbers = {"the loss": stats.loss, "the KL": stats.kl, "the gradient norm": stats.grad_norm}
    stop_if_not_finite(f"step {step}", numbers, say_too_fast(stats.learning_rate))


def say_too_fast(learning_rate: float) -> str:
    """What a loss or gradient means that is not a number."""
    return (
        "this update broke the policy, and nothing of it is kept; lower learning_rate (here "
        f"{learning_rate:g}) or grad_clip, {SMALLER}, or take model.dtype: float32"
    )


def stop_if_engines_differ(config: Config, engines: Floats, learner: Floats, step: int) -> None:
    """`engines` `[engines, tokens]` and `learner` `[tokens]` are log-probs of the same tokens, which must
    agree."""
    where = f"step {step}"
    for who, logprobs in (("the engine", engines), ("the learner", learner)):
        stop_if_not_finite(where, {f"a log-prob of {who}": float(logprobs.sum())}, BROKEN)
    gap = measure_parity_gap(engines, learner)
    if not gap <= config.parity_tolerance:
        raise RunStopped(
            f"{where}: engine and learner differ by {gap:.3g} nats a token (rollout.parity_tolerance = "
            f"{config.parity_tolerance:g}): publishing the weights does not reach every layer of the engine"
        )


def measure_parity_gap(engines: Floats, right: Floats) -> float:
    """Mean difference over tokens of the engine that is furthest off, nats. `engines` [engines, tokens],
    `right` [tokens].

    Not the largest: in bfloat16 single tokens differ by much between any two implementations, while a layer
    of other weights moves all.
    """
    return float(abs(engines - right).mean(axis=1).max())
