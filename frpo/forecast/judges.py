"""Memory of judges, on their machines and on their cards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from frpo.config import JudgeReward
from frpo.forecast.cards import ENGINE_GIB, GIB, Card, Need
from frpo.forecast.host import PROCESS_GIB
from frpo.shape import BYTES, Shape

Judges = Mapping[str, tuple[JudgeReward, Shape]]
"""By role, with the sizes of their models."""


def estimate_judges_on_host(judges: Judges) -> Iterator[Need]:
    """Host memory of one engine of each; the KV cache is one for all its sequences."""
    for role, (judge, shape) in judges.items():
        lines = [("process", PROCESS_GIB["rollout"])]
        if judge.num_gpus == 0:  # vLLM packs a copy of the weights for the CPU
            lines += [("weights", 2 * _weights_gib(judge, shape)), ("KV cache", float(judge.kv_cache_gib))]
        yield Need(role, tuple(lines), "")


def estimate_judges_on_cards(judges: Judges, card: Card) -> Iterator[Need]:
    """One engine of each that has a GPU: all that its share gives it; the KV cache is what the rest
    leaves."""
    for role, (judge, shape) in judges.items():
        if judge.num_gpus > 0:
            weights = _weights_gib(judge, shape)
            cache = judge.memory_share * card.gib - weights - ENGINE_GIB
            lines = (("weights", weights), ("activations, graphs", ENGINE_GIB), ("KV cache", cache))
            yield Need(role, lines, "more num_gpus, or a higher gpu_memory_utilization")


def say_judges_too_large(judges: Judges, card: Card) -> Iterator[str]:
    """Those whose share of a card does not hold their weights and one question, a line each."""
    for need in estimate_judges_on_cards(judges, card):
        judge, shape = judges[need.role]
        question = judge.max_tokens * shape.kv_per_token * BYTES[judge.weights_dtype] / GIB
        cache = dict(need.lines)["KV cache"]
        if cache < question:
            yield (
                f"GPU memory: the weights of {need.role} leave {max(0.0, cache):.1f} GiB of its "
                f"{judge.memory_share:.0%} of an {card.name} for the KV cache, and a question of "
                f"{judge.max_tokens} tokens takes {question:.1f}; give rewards.{judge.name} {need.remedy}"
            )


def _weights_gib(judge: JudgeReward, shape: Shape) -> float:
    return shape.weights * BYTES[judge.weights_dtype] / GIB
