"""Reward functions written for other trainers, told apart by the names of their parameters; TRL's shape is our own.

verl:     compute_score(data_source, solution_str, ground_truth, extra_info=None) -> number, or a dict with "score"
OpenRLHF: reward_func(queries, prompts, labels) -> tensor or list, or a dict with "rewards"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]


def adapted(function: Function) -> Function:
    """The function in the shape f(prompts, completions, **columns)."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return function
    if {"data_source", "solution_str", "ground_truth"} <= names:
        return _verl(function, "extra_info" in names)
    if {"queries", "prompts", "labels"} <= names:
        return _openrlhf(function)
    return function


def _verl(function: Function, takes_extra: bool) -> Function:
    def scores(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        found = []
        for i, text in enumerate(completions):
            row = {name: values[i] if isinstance(values, list) else values for name, values in columns.items()}
            truth = row.get("ground_truth")
            if truth is None and isinstance(row.get("reward_model"), Mapping):  # verl's own rows keep it there
                truth = row["reward_model"].get("ground_truth")
            extra = {"extra_info": row.get("extra_info")} if takes_extra else {}
            answer = function(data_source=row.get("data_source"), solution_str=text, ground_truth=truth, **extra)
            found.append(answer["score"] if isinstance(answer, Mapping) else answer)
        return found

    return scores


def _openrlhf(function: Function) -> Function:
    def scores(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        count = len(completions)
        labels = columns.get("label", columns.get("answer", [None] * count))
        answer = function([p + c for p, c in zip(prompts, completions, strict=True)], prompts, labels)
        rewards = answer["rewards"] if isinstance(answer, Mapping) else answer
        return list(rewards.tolist() if hasattr(rewards, "tolist") else rewards)

    return scores
