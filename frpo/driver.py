"""THE LOOP. One step: draw k completions per prompt, score them, turn rewards into advantages, update the
policy, publish it.

Knows roles, not Ray: the partners may be actors on a cluster or fakes in a test. What a step does depends on
the run's seed and the step's number alone, so a run resumed from any checkpoint ends in the same weights.

    prompts.take(step) -> rollouts -> rewards, log-probs (as soon as a group is there)
        -> advantages -> learner -> rollouts
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from frpo import steering
from frpo.batching import flatten, make_batch
from frpo.clock import Clock
from frpo.config import ArmConfig, Config
from frpo.roles import Learner, Pending, Publisher, Reference, Rewards, Rollouts
from frpo.seeds import derive
from frpo.stats import BatchStats, StepMetrics, UpdateStats
from frpo.stops import (
    stop_if_batch_is_broken,
    stop_if_engines_differ,
    stop_if_rewards_fail,
    stop_if_update_is_broken,
)
from frpo.types import (
    Arrival,
    Flight,
    Floats,
    Group,
    Prompt,
    Reward,
    RolloutBatch,
    Sampling,
    ScoredGroup,
    Sequences,
    Steering,
)


class Prompts(Protocol):
    def take(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of a step (from 0): a pure function of its number."""
        ...

    def at(self, place: int) -> Prompt:
        """The prompt of a place (from 0) among those of all steps."""
        ...


@dataclass(frozen=True)
class Partners:
    prompts: Prompts
    rollouts: Rollouts
    rewards: Rewards
    reference: Reference | None
    learner: Learner
    publisher: Publisher


@dataclass(frozen=True)
class Start:
    """Where a loop begins: the learner holds the weights of `step`."""

    step: int
    steering: Steering
    """What its last step left."""
    flight: Flight | None = None
    """What was drawn and not trained on, where it ran ahead."""


@dataclass(frozen=True)
class Step:
    """A step that is done: the weights are updated and published."""

    metrics: StepMetrics
    steering: Steering
    """Of the next step; with the weights, all that a resumed run needs."""
    last: bool
    """Whether the arm is done."""
    sample: ScoredGroup
    """Of those that it trained on the first by prompt index, for people to read."""
    flight: Flight | None = None
    """What is drawn ahead."""


def train(
    config: Config,
    arm: ArmConfig,
    partners: Partners,
    begun: Start,
    before_update: Callable[[], None] = lambda: None,
) -> Iterator[Step]:
    """Yield the steps of one arm after `begun` to num_steps, fewer where it is to stop at a reward.

    While a yielded step is logged, measured or saved, nothing goes on. `before_update` is called while the
    learner is idle. Raises RunStopped instead of yielding a step that went wrong, or WorkerFailed from a
    partner.
    """
    step, state = begun.step, begun.steering
    partners.publisher.publish(step)
    clock = Clock()
    while not steering.is_finished(state, arm.learner, step):
        clock.begin_step()
        with clock.phase("generate"):
            asked = ask_for_groups(config, arm, partners, step)
        waiting = count_waiting(asked)
        with clock.phase("score"):
            scored = [group.wait() for group in asked]
        with clock.phase("update"):
            batch, stats = make_checked_batch(config, arm, scored, state, step)
            if is_parity_due(config, step, begun):
                check_parity(config, partners, sample_of(scored), step + 1)
            before_update()
            update = partners.learner.update(batch).result()
            stop_if_update_is_broken(config, update, step + 1)
        step += 1
        with clock.phase("publish"):
            published = partners.publisher.publish(step)
        times = clock.times([group.arrival for group in asked])
        metrics = StepMetrics(step, step, stats, update, clock.phases(*waiting), times, published)
        state = next_state(state, arm, stats, update, step)
        yield Step(metrics, state, steering.is_finished(state, arm.learner, step), first_of(scored))


def make_checked_batch(
    config: Config, arm: ArmConfig, scored: Sequence[ScoredGroup], state: Steering, step: int
) -> tuple[RolloutBatch, BatchStats]:
    """What the step after `step` trains on. Raises RunStopped where nothing may be trained on it."""
    batch, stats = make_batch(scored, arm.objective, state, step)
    stop_if_rewards_fail(config, stats, step + 1)
    stop_if_batch_is_broken(batch, stats, step + 1)
    return batch, stats


def next_state(
    state: Steering, arm: ArmConfig, stats: BatchStats, update: UpdateStats, step: int
) -> Steering:
    done = step / arm.learner.num_steps
    return steering.next_steering(
        state, arm.objective, lam=stats.lam, kl=update.kl, reward=stats.reward, done=done
    )


@dataclass(frozen=True)
class Asked:
    """A group whose scores are being computed; None for those that nobody needs."""

    arrival: Arrival
    rewards: Pending[tuple[Reward, ...]]
    reference: Pending[tuple[Floats, ...]] | None
    policy: Pending[tuple[Floats, ...]] | None

    @property
    def group(self) -> Group:
        return self.arrival.group

    def wait(self) -> ScoredGroup:
        """Raises WorkerFailed."""
        rewards = self.rewards.result()
        reference = self.reference.result() if self.reference else None
        policy = self.policy.result() if self.policy else None
        return ScoredGroup(self.group, rewards, reference, policy)


def ask_for_groups(config: Config, arm: ArmConfig, partners: Partners, step: int) -> list[Asked]:
    """Draw the groups of one step, in order of arrival; each is sent to be scored as soon as it is there."""
    prompts = partners.prompts.take(step)
    seeds = [derive(config.seed, "rollout", step, index) for index in range(len(prompts))]
    asked = []
    began = time.perf_counter()
    for group in partners.rollouts.generate(prompts, seeds, sampling_of(config), step):
        arrival = Arrival(group, began, time.perf_counter())
        asked += ask_policy(arm, partners, [ask(partners, arrival)])
    return asked


def ask(partners: Partners, arrival: Arrival) -> Asked:
    """All but the policy's log-probs."""
    rewards = partners.rewards.score(arrival.group)
    reference = partners.reference.score(arrival.group) if partners.reference else None
    return Asked(arrival, rewards, reference, None)


def ask_policy(arm: ArmConfig, partners: Partners, groups: Sequence[Asked]) -> list[Asked]:
    """The learner's log-probs too, by the policy that it has now, where they are wanted."""
    if not scores_policy(arm):
        return list(groups)
    return [replace(asked, policy=partners.learner.score(asked.group)) for asked in groups]


def count_waiting(asked: Sequence[Asked]) -> tuple[int, int]:
    """How many groups still lack their rewards, and how many the reference's log-probs."""
    rewards = sum(not group.rewards.ready() for group in asked)
    reference = sum(not group.reference.ready() for group in asked if group.reference)
    return rewards, reference


def scores_policy(arm: ArmConfig) -> bool:
    """Whether the learner's log-probs are wanted before the update: for the penalty, or as the old ones where
    the weights move before the last pass. Else the update itself tells the KL."""
    return arm.objective.wants_divergence or arm.learner.wants_old


def sampling_of(config: Config) -> Sampling:
    r = config.rollout
    return Sampling(r.group_size, r.max_new_tokens, r.temperature, r.top_p, r.stop)


def is_parity_due(config: Config, step: int, begun: Start) -> bool:
    return step == begun.step or step % config.rollout.steps_between_parity == 0


def first_of(scored: Sequence[ScoredGroup]) -> ScoredGroup:
    """By prompt index, whatever came first."""
    return min(scored, key=lambda item: item.group.index)


def sample_of(scored: Sequence[ScoredGroup], count: int = 8) -> Sequences:
    """The first completion of the first groups by prompt index."""
    groups = sorted((s.group for s in scored), key=lambda g: g.index)[:count]
    return flatten([(g.prompt.token_ids, g.completions[0].token_ids) for g in groups])


def check_parity(config: Config, partners: Partners, sequences: Sequences, step: int) -> None:
    """The engines and the learner must give the same log-probs to the same tokens."""
    engines, learner = partners.rollouts.logprobs(sequences), partners.learner.logprobs(sequences)
    stop_if_engines_differ(config, engines, learner, step)
