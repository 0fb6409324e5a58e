"""Scores a batch of completions by functions, models and judges, weighted and routed by task. Knows neither
Ray nor HTTP.

A reward that raises, takes too long, or gives NaN or the wrong number of values has failed: its completions
get None with the reason, never 0. One that gives None does not apply to the row, and leaves its total, as in
TRL.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from frpo import hub
from frpo.config import (
    Combine,
    ConfigError,
    FunctionReward,
    JudgeReward,
    ModelReward,
    RewardConfig,
    ServeReward,
    UrlReward,
)
from frpo.rewards.calling import messages_of
from frpo.rewards.endpoint import UrlScorer
from frpo.rewards.parts import Part, describe_error, in_range, part_of
from frpo.rewards.pool import Functions
from frpo.types import Item, Reward

STRETCH = 1.15
"""Of a reward model's batches; see `packing.cut_micro_batches`."""

NOT_THIS_ROW = "no reward applies to this row"

Call = Callable[[list[Item]], list[Any]]
"""Scores a batch: one value per item (a number, None, an exception, or a Reward of another scorer). It may
raise."""


def no_handle(reward: ServeReward | JudgeReward) -> Call:
    raise ConfigError(
        f"rewards.{reward.name}.kind: {reward.kind} works in a run on a Ray cluster alone; use kind: url here"
    )


class RewardScorer:
    """All rewards of a run. `handle` makes the call of a reward that others in the same Ray cluster answer.
    May be called from several threads."""

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        combine: Combine = "weighted",
        *,
        handle: Callable[[ServeReward | JudgeReward], Call] = no_handle,
    ) -> None:
        self.rewards = tuple(rewards)
        self.combine = combine
        self.functions = Functions(
            {f"rewards.{i}": r for i, r in enumerate(rewards) if isinstance(r, FunctionReward)}
        )
        self.calls: dict[str, Call] = {}
        for reward in rewards:
            if isinstance(reward, ServeReward | JudgeReward):
                self.calls[reward.name] = handle(reward)
            elif not isinstance(reward, FunctionReward):
                self.calls[reward.name] = call_of(reward)

    def load(self) -> None:
        """Start the processes of the functions and load the reward models now; else that is done at the first
        call.

        Raises RuntimeError when a function does not load, ValueError for a model that cannot be a reward.
        """
        if self.functions.rewards:
            self.functions.load()
        for call in self.calls.values():
            if isinstance(call, ModelScorer):
                call.load()

    def score(self, items: Sequence[Item]) -> list[Reward]:
        """One Reward per item, in order."""
        asked: list[RewardConfig] = []
        shares: list[list[Item]] = []
        for reward in self.rewards:
            share = [items[i] for i in route_items(reward, items)]
            if share:
                asked.append(reward)
                shares.append(share)
        if len(asked) < 2:
            parts = list(map(self.parts, asked, shares))
        else:
            with ThreadPoolExecutor(len(asked)) as side_by_side:
                parts = list(side_by_side.map(self.parts, asked, shares))
        names = [reward.name for reward in asked]
        return combine_parts(self.rewards, self.combine, items, dict(zip(names, parts, strict=True)))

    def parts(self, reward: RewardConfig, items: list[Item]) -> list[Part]:
        """What one of the rewards finds for each item."""
        if isinstance(reward, FunctionReward):
            return self.functions.score(reward, items)
        return parts_here(self.calls[reward.name], items, reward)

    def close(self) -> None:
        """End the processes of the functions."""
        self.functions.close()


def call_of(reward: ModelReward | UrlReward) -> Call:
    return ModelScorer(reward) if isinstance(reward, ModelReward) else UrlScorer(reward)


def route_items(reward: RewardConfig, items: Sequence[Item]) -> list[int]:
    """Positions of the items whose task the reward applies to."""
    return [i for i, item in enumerate(items) if not reward.tasks or item.task in reward.tasks]


def combine_parts(
    rewards: Sequence[RewardConfig],
    combine: Combine,
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Part]],
) -> list[Reward]:
    """One Reward per item. `answers` holds by the name of a reward its parts of the items that it is routed
    to."""
    parts: list[dict[str, Part]] = [{} for _ in items]
    for reward in rewards:
        for i, part in zip(route_items(reward, items), answers.get(reward.name, ()), strict=True):
            parts[i][reward.name] = part
    return [_total_of(rewards, combine, item, own) for item, own in zip(items, parts, strict=True)]


def _total_of(
    rewards: Sequence[RewardConfig], combine: Combine, item: Item, parts: Mapping[str, Part]
) -> Reward:
    """The combination of an item's parts; None when one of them failed, or none applies."""
    apply = {name: part for name, part in parts.items() if part != (None, None)}
    values = {name: value for name, (value, _) in apply.items()}
    if not parts:
        return Reward(None, values, f"no reward applies to task {item.task!r}; name it in rewards.*.tasks")
    if not apply:
        gave_none = ", ".join(parts)
        return Reward(None, values, f"{NOT_THIS_ROW} of task {item.task!r}: {gave_none} gave None")
    errors = [f"{name}: {why}" for name, (value, why) in apply.items() if value is None]
    if errors:
        return Reward(None, values, "; ".join(errors))
    numbers = {name: value for name, value in values.items() if value is not None}
    value, why = in_range(_combine_values(rewards, combine, numbers))
    return Reward(value, values, why and f"total: {why}")


def _combine_values(rewards: Sequence[RewardConfig], combine: Combine, values: Mapping[str, float]) -> float:
    """The product of the values, their weighted sum, or that over the sum of the weights."""
    if combine == "product":
        return math.prod(values.values())
    weights = {reward.name: reward.weight for reward in rewards if reward.name in values}
    weighted = sum(weights[name] * value for name, value in values.items())
    if combine == "mean":
        return weighted / sum(weights.values())
    return weighted


def parts_here(call: Call, items: list[Item], reward: RewardConfig) -> list[Part]:
    """Of a reward that is called in this process and keeps its own time limit: a model, an endpoint, a
    service of the same cluster."""
    try:
        values = call(items)
    except Exception as error:
        return [(None, describe_error(error))] * len(items)
    if len(values) != len(items):
        return [(None, f"gave {len(values)} values for {len(items)} completions")] * len(items)
    return [_part_here(value, reward) for value in values]


def _part_here(value: Any, reward: RewardConfig) -> Part:
    """The part that a value is, or another scorer's Reward; where that does not apply to the row, neither
    does this."""
    if not isinstance(value, Reward):
        return part_of(value, reward)
    if value.total is not None:
        return part_of(value.total, reward)
    if str(value.error).startswith(NOT_THIS_ROW):
        return None, None
    return None, value.error


class ModelScorer:
    """A sequence-classification model with one label, loaded at the first call."""

    def __init__(self, reward: ModelReward) -> None:
        self.reward = reward
        self.model: Any = None
        self.lock = threading.Lock()

    def load(self) -> None:
        """Once. Raises ValueError for a model with more than one label."""
        if self.model is not None:
            return
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = hub.on_this_node(self.reward.path)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left", padding_side="right")
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
        if model.config.num_labels != 1:
            raise ValueError(
                f"{self.reward.path} has {model.config.num_labels} labels; a reward model has one"
            )
        if self.tokenizer.pad_token is None:
            # what pads is masked, and the model looks for the last token before it
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(self.device).eval()

    def text(self, item: Item) -> tuple[str, bool]:
        """What the model reads, and whether the tokenizer adds its special tokens: through the chat template,
        unless it comes from a caller who has done that (its prompt holds special tokens, or is not told apart
        from the completion)."""
        tokenizer = self.tokenizer
        if not item.prompt or any(token in item.prompt for token in tokenizer.all_special_tokens):
            text = item.prompt + item.completion + item.ending
            return text, not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        if tokenizer.chat_template:
            answer = {"role": "assistant", "content": item.completion}
            turns = [*self.template_messages(item), answer]
            return str(tokenizer.apply_chat_template(turns, tokenize=False)), False
        prompt = "\n".join(message["content"] for message in messages_of(item))
        return f"{prompt}\n{item.completion}", True

    def template_messages(self, item: Item) -> list[dict[str, str]]:
        """The messages before the completion; a template without a system role reads them at the start of the
        first user message."""
        messages = messages_of(item)
        if messages[0]["role"] != "system" or self._takes_system():
            return messages
        system = messages[0]["content"]
        rest = messages[1:]
        if not rest or rest[0]["role"] != "user":
            return [{"role": "user", "content": system}, *rest]
        return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]

    def _takes_system(self) -> bool:
        probe = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
        try:
            self.tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:  # jinja's, raised by the template
            return False
        return True

    def __call__(self, items: list[Item]) -> list[Any]:
        """One value per item; an exception for those that the model cannot take, and that the time limit
        leaves no time for."""
        with self.lock:
            self.load()
            return self._score(items, time.monotonic() + self.reward.timeout_s)

    def _score(self, items: list[Item], deadline: float) -> list[Any]:
        from frpo.packing import cut_micro_batches

        reward = self.reward
        late = TimeoutError(f"not reached within {reward.timeout_s:g} s (rewards.{reward.name}.timeout_s)")
        rows = [self._tokenize(item) for item in items]
        scores = list(rows)  # an exception stays where it is
        fit = [i for i, row in enumerate(rows) if not isinstance(row, Exception)]
        lengths = [len(rows[i]["input_ids"]) for i in fit]
        for chosen in cut_micro_batches(lengths, reward.batch_tokens, stretch=STRETCH):
            batch = [fit[i] for i in chosen]
            if time.monotonic() > deadline:
                values = [late] * len(batch)
            else:
                values = self._forward([rows[i] for i in batch])
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
        return scores

    def _tokenize(self, item: Item) -> Any:
        """Token ids of one item; the exception where the template or the tokenizer refuses it."""
        try:
            text, special = self.text(item)
            row = self.tokenizer(
                text, truncation=True, max_length=self.reward.max_tokens, add_special_tokens=special
            )
        except Exception as error:
            return error
        return row if row["input_ids"] else ValueError("no tokens to score")

    def _forward(self, rows: list[Any]) -> list[Any]:
        """One value per row; a row that the model cannot take is tried apart from the others."""
        import torch

        try:
            padded = self.tokenizer.pad(rows, return_tensors="pt").to(self.device)
            with torch.no_grad():
                logits = self.model(**padded).logits[:, 0].float()
        except Exception as error:
            if len(rows) == 1:
                return [error]
            return [self._forward([row])[0] for row in rows]
        if self.reward.squash == "sigmoid":
            logits = torch.sigmoid(logits)
        return logits.tolist()
