"""Scores of a RewardScorer that lives for one call: its processes end with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from frpo.config import Combine, RewardConfig
from frpo.rewards.scoring import RewardScorer
from frpo.types import Item, Reward


def score_with(
    rewards: Sequence[RewardConfig], items: Sequence[Item], combine: Combine = "weighted"
) -> list[Reward]:
    with closing(RewardScorer(rewards, combine)) as scorer:
        return scorer.score(items)
