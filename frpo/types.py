"""The records that cross a process boundary. Frozen, typed, with shapes and units; no behaviour beyond
slicing.

Shape letters: P prompt tokens, T completion tokens, N sequences of a batch, k completions of a group.
Token ids are int32, log-probabilities float32 in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt data set, already tokenized (chat template applied)."""

    id: str
    """Unique in a run: "<data set>:<row>"."""
    text: str
    """What a person reads: the prompt string, or the last user message."""
    token_ids: Ints
    """[P]"""
    task: str
    """Routes rewards and mixes data sets."""
    columns: Mapping[str, Any]
    """Every other column of the row, as reward functions receive it."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The whole conversation (role, content), where the prompt was made of one; empty for plain strings."""
    conversational: bool = False
    """Whether the row itself holds chat messages: functions then get TRL's conversational shape. False for
    strings under chat: true."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 1 and top_p 1 sample from the policy itself."""

    num_completions: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    token_ids: Ints
    """[T], the end-of-sequence token included when finish_reason is "stop"."""
    logprobs: Floats
    """[T], log-probs of the behaviour policy at the sampling temperature."""
    versions: Ints
    """[T], updates that the policy had seen when it drew each token: they rise where weights were changed in
    the middle."""
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class Group:
    """The k completions of one prompt."""

    index: int
    """Position of the prompt in its batch: batches are ordered by it, never by arrival."""
    prompt: Prompt
    completions: tuple[Completion, ...]

    @property
    def policy_version(self) -> int:
        """The oldest that drew a token of these."""
        return min(int(completion.versions[0]) for completion in self.completions)


@dataclass(frozen=True)
class Ticket:
    """A prompt to draw from, ahead of the learner."""

    number: int
    """Position among all prompts of the run; index of its group."""
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Arrival:
    """A group that is there, and when it was drawn: by time.perf_counter of the driver's process. What an
    earlier process drew is older than everything."""

    group: Group
    began: float = -math.inf
    """An engine was given its prompt."""
    ended: float = -math.inf
    """It was there, whether or not the loop looked."""


@dataclass(frozen=True)
class Arrivals:
    """What has become of tickets since it was last asked."""

    arrived: tuple[Arrival, ...] = ()
    lost: tuple[int, ...] = ()
    """Numbers of those whose engine died."""

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(arrival.group for arrival in self.arrived)


@dataclass(frozen=True)
class Flight:
    """What a loop that runs ahead has begun to draw and not trained on: with the weights, all that a resumed
    run needs of it."""

    begun: int
    """Numbers of prompts below it have begun once."""
    waiting: tuple[int, ...]
    """Those of them that are to be drawn again."""
    groups: tuple[Group, ...]
    """Those that are drawn."""


@dataclass(frozen=True)
class Item:
    """One completion to score."""

    prompt: str
    """The prompt string, or the last user message."""
    completion: str
    task: str
    columns: Mapping[str, Any]
    ending: str = ""
    """Special tokens after the completion, where a caller sent them: models read them, functions do not."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The whole conversation before the completion (role, content); empty for plain strings."""
    conversational: bool = False
    """Whether the row holds chat messages: functions then get TRL's conversational shape."""
    completion_ids: tuple[int, ...] | None = None
    """[T]; None where a caller sent text alone."""
    step: int = 0
    """Updates that the policy had seen when it drew this."""


@dataclass(frozen=True)
class Decoding:
    """How a judge is to answer."""

    max_tokens: int | None
    """None: as much as the engine has room for."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    """EBNF of all that may be answered; None: anything."""
    schema: Mapping[str, Any] | None = None
    """The same as a JSON schema."""
    logprobs: int | None = None
    """How many of the first token's are wanted."""


@dataclass(frozen=True)
class Reply:
    """What a judge has said."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    cut: bool
    """Whether it ended at max_tokens."""
    begun: Mapping[str, float]
    """Probability of each text that the first token might have been, where that was asked for."""


@dataclass(frozen=True)
class Reward:
    """The reward of one completion. A failed reward is None, never 0."""

    total: float | None
    """Weighted sum of the parts; None when any part failed."""
    parts: Mapping[str, float | None]
    """Unweighted value of each reward that applies to the prompt's task."""
    error: str | None = None
    """Why it failed."""


@dataclass(frozen=True)
class ScoredGroup:
    group: Group
    rewards: tuple[Reward, ...]
    """k, in the order of the completions."""
    reference: tuple[Floats, ...] | None
    """k arrays [T], log-probs of the reference; None when no penalty asks for them."""
    policy: tuple[Floats, ...] | None = None
    """k arrays [T], log-probs of the policy by the learner, before the update; None where it can do without
    them."""


@dataclass(frozen=True)
class Sequences:
    """N prompt + completion token sequences, flat: sequence i is tokens[offset_i : offset_i + lengths[i]]."""

    tokens: Ints
    """[sum of lengths]"""
    prompt_lengths: Ints
    """[N]"""
    lengths: Ints
    """[N], prompt and completion together"""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_completion_tokens(self) -> int:
        return int(self.lengths.sum() - self.prompt_lengths.sum())


@dataclass(frozen=True)
class Anchor:
    """Completions that a policy drew before it was fine-tuned, and how likely it found them then."""

    sequences: Sequences
    logprobs: Floats
    """[sum of completion lengths], by the ranks that fine-tune it, at temperature 1"""


@dataclass(frozen=True)
class Steering:
    """What a run adjusts between steps; with the weights, its whole state."""

    beta: float
    """Weight of the KL penalty in the next step."""
    centre: float
    """beta without its reaction to the last batch: the slow part of what steers it."""
    lam: float | None
    """Smoothed lam of radius mode; None before its first batch, and for arms that are given lam."""
    rewards: tuple[float, ...] = ()
    """Mean rewards of the last batches, newest last; what stop_at_reward looks at."""


@dataclass(frozen=True)
class RolloutBatch:
    """What one step trains on: every completion that kept its reward, ordered by prompt index."""

    sequences: Sequences
    advantages: Floats
    """[N], reward units"""
    behaviour: Floats
    """[sum of completion lengths], log-probs under the policy that drew them"""
    old: Floats | None
    """[sum of completion lengths], log-probs of the policy by the learner before the update; None where they
    were not asked for"""
    reference: Floats | None
    """[sum of completion lengths]; None without a penalty"""
    fresh: NDArray[np.bool_]
    """[N], whether the policy that is updated drew all of its group: else even what it drew stands on keys
    and values of an older one"""
    betas: Floats
    """[N], weight of the penalty of its tokens in this step, reward units per nat; 0 where a gate lets it
    pass"""


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint, as whoever wrote it tells."""

    path: str
    size: int
    """Bytes."""
    sha256: str
