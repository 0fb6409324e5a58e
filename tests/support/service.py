"""The reward service's backend of plain functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frpo.config.service import ServiceConfig
from frpo.rewards.scoring import RewardScorer
from frpo.types import Item, Reward

REWARDS: list[dict[str, Any]] = [
    {
        "kind": "function",
        "name": "right",
        "function": "frpo.rewards:exact_answer",
        "weight": 2.0,
        "tasks": ["", "sum"],
    },
    {"kind": "function", "name": "short", "function": "frpo.rewards:length", "arguments": {"max_words": 2}},
]


class Here:
    """The scoring classes in this process."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self.scorers: dict[tuple[str, ...], RewardScorer] = {}

    async def score(self, items: Sequence[Item], names: Sequence[str]) -> list[Reward]:
        asked = tuple(r.name for r in self.config.rewards if r.name in names)
        scorer = self.scorers.setdefault(
            asked, RewardScorer([r for r in self.config.rewards if r.name in asked])
        )
        return scorer.score(items)

    async def ready(self) -> bool:
        return True


def config(**fields: Any) -> ServiceConfig:
    return ServiceConfig.model_validate({"rewards": REWARDS, **fields})
