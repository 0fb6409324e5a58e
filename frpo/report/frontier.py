"""What a fine-tune learned against what it left of the arm: the trade-off that defences move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frpo.records import Estimate, Interpolation, Record, StageResult
from frpo.report.lookup import task_reward


class FrontierPoint(Record):
    """One arm through one downstream fine-tune."""

    arm: str
    downstream: str
    defence: str
    """What the fine-tune does against forgetting, in words; empty for nothing."""
    learned: float
    """Held-out downstream loss before - after, nats per token."""
    kept: Estimate
    """Reward on the focus task afterwards."""
    interpolation: Interpolation | None
    """Where the policy was chosen on the way from the arm to the fine-tune."""


def find_frontier(
    config: Mapping[str, Any], arms: Sequence[str], results: Mapping[str, StageResult], focus: str | None
) -> Iterator[FrontierPoint]:
    """A point for every finished fine-tune that has held-out examples, by arm; `config` is a run's as it
    wrote it."""
    for arm in arms:
        for task in config["downstream"]:
            result = results.get(f"downstream/{arm}/{task['name']}")
            point = _point_of(arm, task, result, focus) if result and focus else None
            if point:
                yield point


def _point_of(arm: str, task: Mapping[str, Any], result: StageResult, focus: str) -> FrontierPoint | None:
    before = result.evaluations[0].downstream_loss
    after = result.evaluations[-1].downstream_loss
    kept = task_reward(result.evaluations[-1], focus)
    if before is None or after is None or kept is None:
        return None
    return FrontierPoint(
        arm=arm,
        downstream=task["name"],
        defence=describe_defence(task),
        learned=before - after,
        kept=kept,
        interpolation=result.interpolation,
    )


def describe_defence(task: Mapping[str, Any]) -> str:
    """Example: "replay 0.25, KL to the policy x 0.1, weights averaged (0.99)"."""
    words = []
    if task.get("replay"):
        words.append(f"replay {task['replay']:g}")
    if task.get("kl_to_policy"):
        words.append(f"KL to the policy x {task['kl_to_policy']:g}")
    if task.get("ema"):
        words.append(f"weights averaged ({task['ema']:g})")
    if task.get("interpolate"):
        words.append("interpolated")
    lora = task.get("lora", "run")
    if lora != "run":
        words.append(f"adapters of rank {lora['rank']}" if lora else "no adapters")
    return ", ".join(words)
