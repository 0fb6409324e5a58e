"""The reward service's backend of plain functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frpo.config.service import ServiceConfig
from frpo.rewards.scoring import RewardScorer
from frpo.types import Decoding, Item, Reply, Reward

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


SCORERS: dict[str, RewardScorer] = {}
"""By their rewards, for all of a test session: each has processes of its own."""


def half_of(reward: Any) -> Any:
    return lambda items: [0.5] * len(items)


class Here:
    """The scoring classes in this process. A judge gives each item half, and says what it was told last; it
    knows the JSON schema {} alone, and comes too late for "slow"."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config

    async def score(self, items: Sequence[Item], names: Sequence[str]) -> list[Reward]:
        chosen = [reward for reward in self.config.rewards if reward.name in names]
        key = "\n".join(reward.model_dump_json() for reward in chosen)
        if key not in SCORERS:
            SCORERS[key] = RewardScorer(chosen, handle=half_of)
        return SCORERS[key].score(items)

    async def chat(
        self, name: str, messages: Sequence[dict[str, str]], decoding: Decoding
    ) -> Reply | Exception:
        said = messages[-1]["content"]
        if said == "slow":
            return TimeoutError("not answered")
        if decoding.schema:
            return ValueError("no such schema")
        words = said.split()
        most = decoding.max_tokens or 100
        text = f"{name} at {decoding.temperature:g}: {' '.join(words[:most])}"
        return Reply(text, len(messages), min(most, len(words)), len(words) > most, {})

    async def ready(self) -> bool:
        return True


def config(**fields: Any) -> ServiceConfig:
    return ServiceConfig.model_validate({"rewards": REWARDS, **fields})
