"""Differences of two policies on the same prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from frpo.records import TaskReward
from frpo.report.schema import Kept
from frpo.report.student import CONFIDENCE, Difference

Rewarded = tuple[float, Sequence[float | None]]
"""Mean reward of a policy, and that of each prompt; None where every reward failed."""


def rewards_of(measured: TaskReward) -> Rewarded:
    return measured.reward.mean, measured.per_prompt


def kept_rewards(kept: Kept) -> Rewarded:
    return kept.after.mean, kept.per_prompt


def fill_failed(rewarded: Rewarded) -> list[float]:
    """Of each prompt; one whose rewards all failed counts as the mean."""
    mean, per_prompt = rewarded
    return [mean if reward is None else reward for reward in per_prompt]


def difference_of(a: Rewarded, b: Rewarded, confidence: float = CONFIDENCE) -> Difference:
    """Mean reward of a less that of b; what both share of a prompt is not in the standard error. A prompt all
    of whose rewards failed for one of them is in neither the mean nor the error. There is no error from fewer
    than two prompts that both have, or where they were not measured on the same ones."""
    if len(a[1]) != len(b[1]):
        return Difference(mean=a[0] - b[0], se=None, num_prompts=0, confidence=confidence)
    gaps = []
    for of_a, of_b in zip(a[1], b[1], strict=True):
        if of_a is not None and of_b is not None:
            gaps.append(of_a - of_b)
    se = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    some_failed = 0 < len(gaps) < len(a[1])
    mean = statistics.fmean(gaps) if some_failed else a[0] - b[0]
    return Difference(mean=mean, se=se, num_prompts=len(gaps), confidence=confidence)


def lower_limit(difference: Difference) -> float:
    """Of its interval; minus infinity where there is none."""
    return -math.inf if difference.half is None else difference.mean - difference.half


def upper_limit(difference: Difference) -> float:
    """Of its interval; infinity where there is none."""
    return math.inf if difference.half is None else difference.mean + difference.half
