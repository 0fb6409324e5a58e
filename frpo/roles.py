"""What the driver asks of its partners. Owned by neither side: `actors/` implements these, tests bring
fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from frpo.config import FinetuneConfig, LearnerConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from frpo.records import BenchmarkScore
from frpo.stats import FinetuneStats, UpdateStats
from frpo.types import (
    Anchor,
    Arrivals,
    Floats,
    Group,
    Prompt,
    Reward,
    RolloutBatch,
    Sampling,
    Sequences,
    Ticket,
    Written,
)

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """An answer that is being computed elsewhere."""

    def result(self) -> T_co:
        """Wait for it, within the role's time limit. Raises WorkerFailed, which names the worker."""
        ...

    def ready(self) -> bool:
        """Whether `result` would return (or raise) at once."""
        ...


class Running(Pending[T_co], Protocol[T_co]):
    """One that tells when it is there."""

    def on_ready(self, call: Callable[[], None]) -> None:
        """Call `call`, from whichever thread, as soon as it is `ready`."""
        ...


class Writing(Protocol):
    """Files that are being written elsewhere."""

    def ready(self) -> bool:
        """Whether all are. Raises as `result`."""
        ...

    def result(self, limit_s: float | None = None) -> list[Written]:
        """Wait for them, `limit_s` seconds or as long as a call may take. Raises WorkerFailed, which names
        the worker."""
        ...


class WorkerFailed(RuntimeError):
    """A worker died for good, failed, or did not answer in time. The message is the paragraph that the user
    reads: which worker, which call, its last log lines."""


class RankDied(WorkerFailed):
    """A rank of a training job died. The others wait for it in vain; training goes on from its last
    checkpoint when all are revived."""

    def __init__(self, job: Literal["learner", "fine-tune"], message: str) -> None:
        super().__init__(message)
        self.job = job


class Rollouts(Protocol):
    """The engines."""

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
    ) -> Iterator[Group]:
        """Yield one group per prompt as soon as it is finished, in any order; group.index is the prompt's
        position.

        Drawn by `policy_version`, the one published last. Equal seeds give equal completions.
        """
        ...

    def open(self, sampling: Sampling) -> DrawSession:
        """Draw groups one by one, while everything else goes on."""
        ...

    def logprobs(self, sequences: Sequences) -> Floats:
        """Log-probs of the completion tokens at temperature 1 by every engine, [engines, sum of completion
        lengths]."""
        ...

    def load_policy(self, folder: Path, version: int) -> None:
        """Run a saved policy from now on, published as `version`."""
        ...

    def take_turn(self) -> None:
        """Hold the cards that the engines share with other roles, for somebody who asks them directly."""
        ...


class DrawSession(Protocol):
    """Groups that are being drawn by whichever engine is free, under the version published last when each
    token is drawn."""

    @property
    def room(self) -> int:
        """How many more prompts the engines have use for now."""
        ...

    def begin(self, ticket: Ticket, policy_version: int) -> None:
        """`policy_version`: the one published last."""
        ...

    def wait(self, until: Running[object] | None = None) -> Arrivals:
        """Wait for a group, or until `until`, which the learner computes, is ready; without it the learner is
        idle. Raises WorkerFailed: nothing came within the limit, an engine died for good, or a prompt cannot
        be drawn."""
        ...

    def close(self) -> None:
        """Give up what is not drawn yet."""
        ...


class Rewards(Protocol):
    def score(self, group: Group) -> Pending[tuple[Reward, ...]]: ...


class Reference(Protocol):
    def use(self, policy: Path, temperature: float) -> None:
        """The policy to score by from now on, and the rollouts' temperature."""
        ...

    def score(self, group: Group) -> Pending[tuple[Floats, ...]]:
        """k arrays [T]: log-probs of a group at the rollouts' temperature."""
        ...


class PolicyScorer(Protocol):
    def submit(self, policy: Path, groups: Sequence[Group]) -> Pending[list[tuple[Floats, ...]]]:
        """Log-probs of every completion under a saved policy, at temperature 1."""
        ...


class Trainer(Protocol):
    """What learners and fine-tune workers have in common: ranks that hold a policy in training."""

    def submit(self, groups: Sequence[Group]) -> Pending[list[tuple[Floats, ...]]]:
        """Log-probs of every completion under the policy in training, the same as PolicyScorer's of that
        policy."""
        ...

    def save(self, folder: Path) -> Writing:
        """Write weights, optimiser, schedule and RNG of all ranks, as they are now, into `folder` (not
        crash-safe by itself)."""
        ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path, *, merged: bool = False) -> None:
        """Write the policy as a Hugging Face or PEFT folder, safetensors, with its tokenizer. `merged`: an
        adapter is added to the weights it stands on."""
        ...

    def stop(self) -> None:
        """Free what the policy in training holds."""
        ...

    def revive(self) -> None:
        """Start all ranks anew, without a policy. Raises WorkerFailed where that was done too often."""
        ...


class Learner(Trainer, Protocol):
    def start(
        self,
        policy: Path,
        model: ModelConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        rollout: RolloutConfig,
        seed: int,
    ) -> None:
        """Begin from a saved policy with a fresh optimiser."""
        ...

    def update(self, batch: RolloutBatch) -> Running[UpdateStats]:
        """One step: the configured number of optimiser updates on the batch."""
        ...

    def logprobs(self, sequences: Sequences) -> Floats:
        """Learner's log-probs of the completion tokens at temperature 1, [sum of completion lengths]."""
        ...

    def score(self, group: Group) -> Pending[tuple[Floats, ...]]:
        """k arrays [T]: log-probs of a group at the rollouts' temperature, the same as Reference's where the
        weights are."""
        ...


class Finetuner(Trainer, Protocol):
    def start(self, policy: Path, model: ModelConfig, finetune: FinetuneConfig, seed: int) -> None:
        """Begin from a saved policy with a fresh optimiser."""
        ...

    def update(self, sequences: Sequences, anchor: Anchor | None = None) -> FinetuneStats:
        """One optimiser update; with an anchor its KL is part of the loss."""
        ...

    def interpolate(self, share: float) -> None:
        """Put the policy at a share of the way from where training began (0) to where it ended (1). Only
        where the configuration has shares to try; nothing is trained afterwards."""
        ...

    def loss(self, sequences: Sequences) -> float:
        """Mean negative log-likelihood, nats per completion token, of the policy in training."""
        ...


class Publisher(Protocol):
    def publish(self, policy_version: int) -> int:
        """Send the trainer's weights to every rollout engine; returns when all of them run this version.
        Bytes that one was sent."""
        ...


class BenchmarkRunner(Protocol):
    def evaluate(self, policy: Path) -> tuple[BenchmarkScore, ...]:
        """Benchmarks of a saved policy, by the engines."""
        ...


@dataclass(frozen=True)
class Team:
    """Whom a run works with, the same across arms and stages."""

    rollouts: Rollouts
    rewards: Rewards
    reference: Reference | None
    learner: Learner
    finetune: Finetuner | None
    """None, and no publisher of its weights, where the plan has no fine-tune ranks."""
    scorer: PolicyScorer
    harness: BenchmarkRunner | None
    learner_publisher: Publisher
    finetune_publisher: Publisher | None
