"""What the page says, a record a section."""

from __future__ import annotations

from typing import Literal

from frpo.records import Record
from frpo.watch.drawing import LivePanel

State = Literal["running", "finished", "stopped", "unknown"]
"""stopped: its process is gone, and stages are left. unknown: the run may be on another machine."""

StageState = Literal["done", "now", "begun", "to do"]


class Now(Record):
    state: State
    heard: float | None
    """When the run last wrote something, seconds since 1970."""
    stage: str
    """In progress, or next; empty where none is."""
    began: float | None
    """When it was begun, seconds since 1970."""
    step: int
    num_steps: int | None
    """None for stages that train nothing, and where the configuration cannot be read."""
    step_s: float | None
    """What a step takes, seconds."""
    waits_for: str
    """What the run said last that it waits for; empty where it goes on."""
    last_words: str
    """The last line of its log."""
    done: int
    stages: int
    left_s: float | None
    """Until all stages that can be foreseen are done, seconds."""
    unforeseen: int
    """Stages to do of kinds that none has been done of."""


class ArmNow(Record):
    """The last steps of an arm's rlhf stage; None where a number was not measured."""

    name: str
    style: int
    step: int
    num_steps: int | None
    reward: float | None
    kl: float | None
    """Nats per completion."""
    without_signal: float | None
    """Share of groups whose rewards are all equal."""
    cut: float | None
    entropy: float | None
    length: float | None


class PhaseShare(Record):
    name: str
    seconds: float
    """A step."""
    share: float
    """Of the longest step of any arm, 0 to 1."""


class ArmPhases(Record):
    name: str
    step_s: float
    tokens_per_s: float
    phases: tuple[PhaseShare, ...]


class StageNow(Record):
    name: str
    """Without its arm; of a downstream stage the fine-tune's."""
    state: StageState
    took_s: float | None
    """Seconds; of one to do, what the same of other arms took."""
    step: int
    num_steps: int | None


class StageGroup(Record):
    """The stages of one arm."""

    owner: str
    style: int | None
    stages: tuple[StageNow, ...]


class HeldoutRow(Record):
    """A policy on held-out prompts."""

    policy: str
    """Its arm's, or what that was fine-tuned on."""
    kl: str
    """To the reference, nats per completion."""
    rewards: tuple[str, ...]
    """In the order of the tasks."""


class MeasuredArm(Record):
    owner: str
    style: int | None
    tasks: tuple[str, ...]
    policies: tuple[HeldoutRow, ...]


class Said(Record):
    """A completion."""

    who: str
    """Which policy, at which step."""
    style: int | None
    completion: str
    reward: float | None


class SaidOfPrompt(Record):
    """What policies made of one prompt, in the order that they came to be."""

    task: str
    prompt: str
    answers: tuple[Said, ...]


class RunView(Record):
    name: str
    folder: str
    seed: int | None
    now: Now
    warnings: tuple[str, ...]
    arms: tuple[ArmNow, ...]
    curves: tuple[LivePanel, ...]
    plane: LivePanel | None
    """Reward over KL: where each arm's training has led it."""
    stages: tuple[StageGroup, ...]
    phases: tuple[ArmPhases, ...]
    measured: tuple[MeasuredArm, ...]
    drawn: tuple[SaidOfPrompt, ...]
    """Of training, the newest first."""
    samples: tuple[SaidOfPrompt, ...]
    """Of measurements, on the same prompts."""
    log: tuple[str, ...]
