"""The records that are written to the run folder and read back by the report. Pydantic, frozen, JSON.

No file holds NaN or infinity, which are no JSON: what may have no value is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue


class Record(BaseModel):
    """Refuses NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def finite_or_none(value: Any) -> Any:
    """The same with None in place of NaN and infinity, in mappings and lists too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def to_json(row: Mapping[str, Any]) -> str:
    """One line of JSON; null in place of NaN and infinity."""
    return json.dumps(finite_or_none(row), ensure_ascii=False, allow_nan=False)


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(to_json(row) + "\n" for row in rows)


Maybe = Annotated[float | None, BeforeValidator(finite_or_none)]
"""A number, or None where there is none: NaN and infinity become None."""


Z95 = 1.96
"""Standard errors on each side of a 95 % interval."""


class Estimate(Record):
    """A mean and its standard error over prompts."""

    mean: float
    se: Maybe
    """None for a single prompt, which says nothing of others: there is no interval."""

    @property
    def half(self) -> float | None:
        """Of the 95 % interval."""
        return None if self.se is None else Z95 * self.se

    def __format__(self, spec: str) -> str:
        """Mean and interval, each by `spec`, of which there is none for a single prompt: "0.64 ± 0.04"."""
        half = "" if self.half is None else f" ± {self.half:{spec}}"
        return f"{self.mean:{spec}}{half}"


class TaskReward(Record):
    """Reward of the held-out prompts of one task."""

    task: str
    reward: Estimate
    parts: Mapping[str, Maybe]
    """Mean of each reward part over the completions that have it."""
    num_prompts: int
    num_completions: int
    failed: int
    """Completions whose reward failed; they are left out of the means."""
    kl_reference: Estimate | None
    """KL(Q || reference) on these prompts, nats per completion, sampled from Q."""
    kl_policy: Estimate | None
    """KL(Q || the arm's policy before downstream), same unit."""
    per_prompt: tuple[float | None, ...] = ()
    """Mean reward of each prompt, in the order of the data; None where every reward failed."""


class Sample(Record):
    task: str
    prompt: str
    completion: str
    reward: float | None


class Evaluation(Record):
    """One policy, measured on the held-out prompts by sampling."""

    arm: str
    """Name of an arm, or "base"."""
    downstream: str | None
    """Downstream task that the policy is being fine-tuned on; None before any."""
    step: int
    """Downstream steps done."""
    rewards: tuple[TaskReward, ...]
    kl_reference: Estimate | None
    """KL(Q || reference), nats per completion, mean over the held-out prompts of trained tasks, sampled from
    Q."""
    kl_policy: Estimate | None
    """KL(Q || the arm's policy before downstream), same unit."""
    downstream_loss: float | None
    """Negative log-likelihood of held-out downstream completions, nats per token."""
    length: float
    """Mean completion length, tokens."""
    cut_share: float
    samples: tuple[Sample, ...]
    seconds: float


class Certificate(Record):
    """What the reward of one arm can fall to on one task; methods in `frpo.certificate`."""

    task: str
    floor: float
    confidence: float
    radii: tuple[float, ...]
    """Nats per completion."""
    plug_in: tuple[float, ...]
    """The formula on the sample: no promise."""
    lo: tuple[float, ...]
    hi: tuple[float, ...]
    """Bootstrap interval of the plug-in."""
    certified: tuple[float, ...]
    """Lower bound, valid for all radii at once; at the floor nothing is promised."""
    radius: float | None
    """The radius that the arm was trained for: its rho, or the mean KL of its tilted policy on these draws;
    None for methods without one."""
    failed: int
    """Failed rewards, counted as the floor."""
    rewards: tuple[tuple[float, ...], ...]
    """[prompts, completions]"""


class BenchmarkScore(Record):
    """One metric of one task of lm-evaluation-harness."""

    task: str
    metric: str
    filter: str
    """How the answer was taken out of the completion; "none" where it was not."""
    value: Maybe
    se: Maybe
    num_examples: int | None


class ArmSummary(Record):
    """What training one arm took, and where it ended."""

    arm: str
    num_steps: int
    num_prompts: int
    num_completions: int
    num_tokens: int
    failed_rewards: int
    seconds: float
    phase_seconds: dict[str, float]
    """generate, score, update, publish, other"""
    weights_sha256: str
    """Over the exported policy file(s)."""


class Made(Record):
    """`made.json` in a stage's folder: what the stage is made from, so that a later call can tell what has
    changed."""

    digest: str
    """SHA-256 over `below` and `values`."""
    below: str
    """Digest of the stage that it stands on; empty for the base."""
    values: dict[str, JsonValue]
    """Fields that count, by path; of those that name files the digest of what these hold."""
    named: dict[str, str]
    """What the latter name."""


class Interpolation(Record):
    """The choice among policies on the way from an arm's weights to the fine-tuned ones."""

    share: float
    """Of the way, at which the policy lies; 1 for the fine-tuned one."""
    shares: tuple[float, ...]
    """All that were tried, from 0 to 1."""
    losses: tuple[float, ...]
    """Of these, on held-out examples, nats per token."""


class StageResult(Record):
    """`done.json` in a stage's folder: its presence with the same `inputs` means the stage need not run
    again."""

    stage: str
    """base, or <kind>/<arm>, or <kind>/<arm>/<task or radius>; harness/base"""
    inputs: str = ""
    """Digest of what the stage was made from (`Made`); set when the result is written."""
    seconds: float = 0.0
    """As `inputs`."""
    evaluations: tuple[Evaluation, ...]
    """In order of step; for base and rlhf one, of the finished policy."""
    arm: ArmSummary | None = None
    """For rlhf stages."""
    certificates: tuple[Certificate, ...] = ()
    """For certify stages, one per task."""
    scores: tuple[BenchmarkScore, ...] = ()
    """For harness stages."""
    interpolation: Interpolation | None = None
    """For fine-tunes that have one."""
