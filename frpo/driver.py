"""THE LOOP. One step: draw k completions per prompt, score them, turn rewards into advantages, update,
publish.

Knows roles, not Ray: the partners may be actors on a cluster or fakes in a test. What a step does depends on
the run's seed and the step's number alone, so a run resumed from any checkpoint ends in the same weights.

    prompts.take(step) -> rollouts -> rewards, log-probs (as soon as a group is there) -> advantages ->
    learner -> rollouts
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from frpo.batching import BatchStats, flatten, make_batch
from frpo.config import ArmConfig, Config
from frpo.roles import Learner, Pending, Publisher, Reference, Rewards, Rollouts
from frpo.seeds import derive
from frpo.steering import after, finished
from frpo.stops import (
    stop_if_batch_is_broken,
    stop_if_engines_differ,
    stop_if_rewards_fail,
    stop_if_update_is_broken,
)
from frpo.types import Prompt, Sampling, ScoredGroup, Sequences, Steering, StepMetrics, UpdateStats

T = TypeVar("T")


class Prompts(Protocol):
    def take(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of a step (from 0): a pure function of its number."""
        ...


@dataclass(frozen=True)
class Partners:
    prompts: Prompts
    rollouts: Rollouts
    rewards: Rewards
    reference: Reference | None
    learner: Learner
    publisher: Publisher


def train(
    config: Config,
    arm: ArmConfig,
    partners: Partners,
    *,
    start: int,
    steering: Steering,
    after_step: Callable[[StepMetrics, Steering], None],
    before_update: Callable[[], None] = lambda: None,
) -> None:
    """Run steps start + 1 .. num_steps of one arm, fewer where it is to stop at a reward. `after_step` logs,
    validates and saves; `before_update` is called while the learner is idle.

    The learner holds the weights of `start`, and `steering` is what its last step left. Raises RunStopped
    before `after_step` is called for a step that went wrong, or WorkerFailed from a partner.
    """
    partners.publisher.publish(start)
    step = start
    while not finished(steering, arm.learner, step):
        began, cpu = time.perf_counter(), time.process_time()
        prompts = partners.prompts.take(step)
        collected = collect(config, arm, partners, prompts, step)
        scored_at = time.perf_counter()
        batch, stats = make_batch(collected.scored, arm.objective, steering)
        stop_if_rewards_fail(config, stats, step + 1)
        stop_if_batch_is_broken(batch, stats, step + 1)
        if step == start or step % config.rollout.parity_every == 0:
            check_parity(config, partners, sample_of(collected.scored), step + 1)
        before_update()
        update = partners.learner.update(batch)
        stop_if_update_is_broken(config, update, step + 1)
        updated_at = time.perf_counter()
        step += 1
        published = partners.publisher.publish(step)
        done = time.perf_counter()
        times = (
            collected.drawn_at - began,
            scored_at - collected.drawn_at,
            updated_at - scored_at,
            done - updated_at,
            done - began,
        )
        metrics = replace(
            describe(step, collected, stats, update, times),
            driver_s=time.process_time() - cpu,
            published_bytes=published,
        )
        share = step / arm.learner.num_steps
        steering = after(
            steering, arm.objective, lam=stats.lam, kl=update.kl, reward=stats.reward, done=share
        )
        after_step(metrics, steering)


@dataclass(frozen=True)
class Collected:
    """The scored groups of one step, in order of arrival."""

    scored: list[ScoredGroup]
    drawn_at: float
    """When the last group arrived, by time.perf_counter()."""
    waiting_rewards: int
    """Groups whose rewards were still missing then."""
    waiting_reference: int


def collect(
    config: Config, arm: ArmConfig, partners: Partners, prompts: Sequence[Prompt], step: int
) -> Collected:
    """Draw the groups of one step; each is scored as soon as it is there."""
    seeds = [derive(config.seed, "rollout", step, index) for index in range(len(prompts))]
    rewards, reference = partners.rewards, partners.reference
    learner = partners.learner if scores_policy(arm) else None
    pending = [
        (
            group,
            rewards.score(group),
            reference.score(group) if reference else None,
            learner.score(group) if learner else None,
        )
        for group in partners.rollouts.generate(prompts, seeds, sampling(config), step)
    ]
    drawn_at = time.perf_counter()
    waiting = [
        sum(not p.ready() for p in column if p)
        for column in ([r for _, r, _, _ in pending], [r for _, _, r, _ in pending])
    ]
    scored = [ScoredGroup(g, r.result(), answer(ref), answer(own)) for g, r, ref, own in pending]
    return Collected(scored, drawn_at, *waiting)


def answer(pending: Pending[T] | None) -> T | None:
    return None if pending is None else pending.result()


def scores_policy(arm: ArmConfig) -> bool:
    """Whether the learner's log-probs are wanted before the update: for the penalty in the advantages, or as
    the old ones of several updates. Else the update itself tells the KL."""
    return arm.objective.reverse or arm.learner.updates_per_batch > 1


def sampling(config: Config) -> Sampling:
    r = config.rollout
    return Sampling(r.group_size, r.max_new_tokens, r.temperature, r.top_p, r.stop)


def sample_of(scored: Sequence[ScoredGroup], count: int = 8) -> Sequences:
    """The first completion of the first groups by prompt index."""
    groups = sorted((s.group for s in scored), key=lambda g: g.index)[:count]
    return flatten([(g.prompt.token_ids, g.completions[0].token_ids) for g in groups])


def check_parity(config: Config, partners: Partners, sequences: Sequences, step: int) -> None:
    """The engines and the learner must give the same log-probs to the same tokens."""
    stop_if_engines_differ(
        config, partners.rollouts.logprobs(sequences), partners.learner.logprobs(sequences), step
    )


def describe(
    step: int,
    collected: Collected,
    stats: BatchStats,
    update: UpdateStats,
    times: tuple[float, float, float, float, float],
) -> StepMetrics:
    generate_s, score_s, update_s, publish_s, step_s = times
    return StepMetrics(
        step=step,
        policy_version=step,
        num_prompts=len(collected.scored),
        waiting_rewards=collected.waiting_rewards,
        waiting_reference=collected.waiting_reference,
        reward=stats.reward,
        reward_std=stats.reward_std,
        group_std=stats.group_std,
        equal_groups=stats.equal_groups,
        advantage_std=stats.advantage_std,
        non_monotone=stats.non_monotone,
        kl=update.kl,
        beta=stats.beta,
        lam=stats.lam,
        radius=stats.radius,
        effective_samples=stats.effective_samples,
        entropy=update.entropy,
        loss=update.loss,
        grad_norm=update.grad_norm,
        learning_rate=update.learning_rate,
        clip_share=update.clip_share,
        mismatch_kl=update.mismatch_kl,
        length=stats.length,
        cut_share=stats.cut_share,
        failed_rewards=stats.failed_rewards,
        dropped_groups=stats.dropped_groups,
        num_completions=stats.num_completions,
        num_tokens=stats.num_tokens,
        generate_s=generate_s,
        score_s=score_s,
        update_s=update_s,
        publish_s=publish_s,
        step_s=step_s,
        reward_parts=stats.parts,
        reward_tasks=stats.tasks,
    )
