"""How reward functions are called: as TRL, verl and OpenRLHF call theirs, told apart by the names of their
parameters.

TRL:      f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns)
          -> one value per completion
verl:     compute_score(data_source, solution_str, ground_truth, extra_info)
          -> a number, or a dict with "score"
          compute_score(data_sources, solution_strs, ground_truths, extra_infos)
          -> a list of either
OpenRLHF: reward_func(queries, prompts, labels)
          -> tensor or list, or a dict with "rewards"; one completion at a time

Always by keyword, and a function without **kwargs gets only what it names. Each may be a plain or an async
function, a partial, a callable object, or a class, which is made once.
https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function,
https://verl.readthedocs.io/en/latest/preparation/reward_function.html, OpenRLHF/README.md (Reinforced
fine-tuning).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from frpo.config import FunctionReward
from frpo.rewards.loading import imports_of, load_function
from frpo.rewards.parts import values_of
from frpo.rewards.signatures import SOLUTIONS, TRUTHS, calling_shape, make_function, parameters_of
from frpo.rewards.waiting import finish_all, finish_one
from frpo.types import Item

LABELS = ("label", "answer")
"""Columns that OpenRLHF's labels are taken from, the first that is there."""


@dataclass(frozen=True)
class TrainerState:
    """What TRL's functions read of the trainer's state."""

    global_step: int
    """Updates that the policy had seen."""


class FunctionScorer:
    """A reward function of any shape, called with items. Raises ConfigError when it does not resolve, and
    whatever its class raises."""

    def __init__(self, reward: FunctionReward, field: str) -> None:
        function = load_function(reward.function, f"{field}.function")
        self.function, self.arguments = make_function(function, reward.arguments)
        self.takes = parameters_of(self.function)
        self.shape = calling_shape(self.takes.names)

    def warm(self) -> None:
        """Import what the function's body imports, so that no call's time limit counts it."""
        for name in imports_of(self.function):
            with suppress(Exception):  # maybe never reached: the call will say
                importlib.import_module(name)

    def __call__(self, items: Sequence[Item]) -> list[Any]:
        """One value per item: what part_of reads."""
        if self.shape == "trl":
            return self._call_trl(items)
        if self.shape == "openrlhf":
            answers = finish_all([partial(self._call, openrlhf_row(item)) for item in items])
            return [_unpack_value(answer, "rewards") for answer in answers]
        if self.shape == "verl":
            solution = next(name for name in SOLUTIONS if name in self.takes.names)
            answers = finish_all([partial(self._call, verl_row(item, solution)) for item in items])
        else:
            answers = self._call_verl_batch(items)
        return [_unpack_value(answer, "score") for answer in answers]

    def _call(self, given: Mapping[str, Any]) -> Any:
        return self.function(**self.takes.take({**given, **self.arguments}))

    def _call_trl(self, items: Sequence[Item]) -> list[Any]:
        given = trl_arguments(items, text=hasattr(self.function, "reads_text"))
        if "completion_ids" not in given and "completion_ids" in self.takes.required:
            raise ValueError("completion_ids: the caller sent text, without token ids")
        return values_of(finish_one(self._call(given)), len(items))

    def _call_verl_batch(self, items: Sequence[Item]) -> list[Any]:
        rows = [verl_row(item, "solution_str") for item in items]
        given = {}
        for name in rows[0]:
            given[f"{name}s"] = [row[name] for row in rows]
        return values_of(finish_one(self._call(given)), len(items))


def trl_arguments(items: Sequence[Item], *, text: bool) -> dict[str, Any]:
    """Keyword arguments of a call in TRL's shape; `text` asks for strings where the rows are chat."""
    names = set[str]().union(*(item.columns for item in items))
    given: dict[str, Any] = {"task": [item.task for item in items]}
    for name in sorted(names):
        given[name] = [item.columns.get(name) for item in items]
    if text or "messages" not in given:
        given["messages"] = [messages_of(item) for item in items]
    given["prompts"] = [_trl_prompt(item, text) for item in items]
    given["completions"] = [_trl_completion(item, text) for item in items]
    given.pop("completion_ids", None)
    if all(item.completion_ids is not None for item in items):
        given["completion_ids"] = [list(item.completion_ids or ()) for item in items]
    given["trainer_state"] = TrainerState(items[0].step)
    given["log_extra"] = _drop_log
    given["log_metric"] = _drop_log
    return given


def messages_of(item: Item) -> list[dict[str, str]]:
    """The messages before the completion; a plain string is one user message."""
    return [dict(message) for message in item.messages] or [{"role": "user", "content": item.prompt}]


def _trl_prompt(item: Item, text: bool) -> Any:
    return messages_of(item) if item.conversational and not text else item.prompt


def _trl_completion(item: Item, text: bool) -> Any:
    if item.conversational and not text:
        return [{"role": "assistant", "content": item.completion}]
    return item.completion


def _drop_log(*_: Any, **__: Any) -> None:
    """log_extra and log_metric: our metrics hold the parts of the reward alone."""


def verl_row(item: Item, solution: str) -> dict[str, Any]:
    """Keyword arguments for one completion, which is called `solution`."""
    extra = item.columns.get("extra_info")
    own = extra if isinstance(extra, Mapping) else {}
    return {
        "data_source": item.columns.get("data_source", item.task),
        solution: item.completion,
        "ground_truth": _ground_truth(item.columns),
        # as verl's reward managers add them
        "extra_info": {**own, "num_turns": None, "rollout_reward_scores": {}},
    }


def _ground_truth(columns: Mapping[str, Any]) -> Any:
    name = next((name for name in TRUTHS if columns.get(name) is not None), None)
    if name is None:
        return None
    truth = columns[name]
    if name == "reward_model" and isinstance(truth, Mapping):
        return truth.get("ground_truth")
    return truth


def openrlhf_row(item: Item) -> dict[str, Any]:
    """Keyword arguments for one completion."""
    label = next((item.columns[name] for name in LABELS if item.columns.get(name) is not None), None)
    row = {"queries": [item.prompt + item.completion], "prompts": [item.prompt], "labels": [label]}
    if item.messages:
        row["messages"] = [messages_of(item)]
    return row


def _unpack_value(answer: Any, key: str) -> Any:
    """The value out of a dict; the error in its place where that has none."""
    if not isinstance(answer, Mapping):
        return answer
    return answer[key] if key in answer else KeyError(key)
