"""What the driver asks of its partners. Owned by neither side: `actors/` implements these, tests bring
fakes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from frpo.types import Floats, Group, Prompt, Reward, RolloutBatch, Sampling, Sequences, UpdateStats, Written

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """An answer that is being computed elsewhere."""

    def result(self) -> T_co:
        """Wait for it, within the role's time limit. Raises WorkerFailed, which names the worker."""
        ...

    def ready(self) -> bool:
        """Whether `result` would return (or raise) at once."""
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


class Rollouts(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
    ) -> Iterator[Group]:
        """Yield one group per prompt as soon as it is finished, in any order; group.index is the prompt's
        position.

        Drawn by `policy_version`, the one published last. Equal seeds give equal completions.
        """
        ...

    def logprobs(self, sequences: Sequences) -> Floats:
        """Log-probs of the completion tokens at temperature 1 by every engine, [engines, sum of completion
        lengths]."""
        ...


class Rewards(Protocol):
    def score(self, group: Group) -> Pending[tuple[Reward, ...]]: ...


class Reference(Protocol):
    def score(self, group: Group) -> Pending[tuple[Floats, ...]]:
        """k arrays [T]: log-probs of a group at the rollouts' temperature."""
        ...


class Learner(Protocol):
    def update(self, batch: RolloutBatch) -> UpdateStats:
        """One step: the configured number of optimiser updates on the batch."""
        ...

    def logprobs(self, sequences: Sequences) -> Floats:
        """Learner's log-probs of the completion tokens at temperature 1, [sum of completion lengths]."""
        ...

    def score(self, group: Group) -> Pending[tuple[Floats, ...]]:
        """k arrays [T]: log-probs of a group at the rollouts' temperature, the same as Reference's where the
        weights are."""
        ...

    def save(self, folder: Path) -> Writing:
        """Write weights, optimiser, schedule and RNG of all ranks, as they are now, into `folder` (not
        crash-safe by itself)."""
        ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face or PEFT folder, safetensors, with its tokenizer."""
        ...


class Publisher(Protocol):
    def publish(self, policy_version: int) -> int:
        """Send the learner's weights to every rollout engine; returns when all of them run this version.
        Bytes that one was sent."""
        ...
