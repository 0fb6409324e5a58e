"""Scores a batch of completions by functions and reward models, weighted and routed by task. Knows neither Ray nor HTTP.

A reward that raises, takes too long, or gives None, NaN or the wrong number of values has failed: its completions get
None with the reason, never 0.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frpo import hub
from frpo.config import Combine, ConfigError, FunctionReward, ModelReward, RewardConfig, ServeReward, UrlReward
from frpo.rewards.foreign import adapted
from frpo.rewards.http import post
from frpo.rewards.loading import load_function
from frpo.types import Reward


@dataclass(frozen=True)
class Item:
    """One completion to score."""

    prompt: str
    completion: str
    task: str
    columns: Mapping[str, Any]
    ending: str = ""
    """Special tokens after the completion, where a caller sent them: models read them, functions do not."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The whole conversation up to the completion, where the prompt was made of one; empty for plain strings."""
    conversational: bool = False
    """Whether the caller's row holds chat messages: functions then get TRL's conversational shape."""


STRETCH = 1.15
"""Of a reward model's batches; see `packing.micro_batches`."""

Part = tuple[float | None, str | None]
"""A value, or None and why."""


Call = Callable[[list[Item]], list[Any]]
"""Scores a batch: one value per item (a number, None, or a Reward of another scorer). It may raise."""


def no_handle(reward: ServeReward) -> Call:
    raise ConfigError(f"rewards.{reward.name}.kind: serve works in a run on a Ray cluster alone; use kind: url here")


class Scorer:
    """All rewards of a run. `handle` makes the call of a reward that is served in the same Ray cluster.

    Raises ConfigError when a function does not resolve.
    """

    def __init__(
        self, rewards: Sequence[RewardConfig], combine: Combine = "weighted", *, handle: Callable[[ServeReward], Call] = no_handle
    ) -> None:
        self.rewards, self.combine = tuple(rewards), combine
        self.run = {r.name: handle(r) if isinstance(r, ServeReward) else scorer_of(r, f"rewards.{i}") for i, r in enumerate(rewards)}

    def load(self) -> None:
        """Load the reward models now; else each is loaded at its first call."""
        for scorer in self.run.values():
            if isinstance(scorer, ModelScorer):
                scorer.load()

    def score(self, items: Sequence[Item]) -> list[Reward]:
        """One Reward per item, in order."""
        asked = {r.name: (r, [items[i] for i in routed(r, items)]) for r in self.rewards}
        found = {name: guarded(self.run[name], mine, reward) for name, (reward, mine) in asked.items() if mine}
        return together(self.rewards, self.combine, items, found)


def routed(reward: RewardConfig, items: Sequence[Item]) -> list[int]:
    """Positions of the items whose task the reward applies to."""
    return [i for i, item in enumerate(items) if not reward.tasks or item.task in reward.tasks]


def together(rewards: Sequence[RewardConfig], combine: Combine, items: Sequence[Item], found: Mapping[str, Sequence[Part]]) -> list[Reward]:
    """One Reward per item, from what each reward found for the items that it applies to."""
    parts: list[dict[str, Part]] = [{} for _ in items]
    for reward in rewards:
        for i, part in zip(routed(reward, items), found.get(reward.name, ()), strict=True):
            parts[i][reward.name] = part
    return [total(rewards, combine, item, p) for item, p in zip(items, parts, strict=True)]


def total(rewards: Sequence[RewardConfig], combine: Combine, item: Item, parts: Mapping[str, Part]) -> Reward:
    """The combination of an item's parts; None when one of them failed, or none applies."""
    values = {name: value for name, (value, _) in parts.items()}
    errors = [f"{name}: {why}" for name, (value, why) in parts.items() if value is None]
    if not parts:
        errors = [f"no reward applies to task {item.task!r}; name it in rewards.*.tasks"]
    if errors:
        return Reward(None, values, "; ".join(errors))
    found = {name: value for name, value in values.items() if value is not None}
    if combine == "product":
        return Reward(math.prod(found.values()), values)
    weights = {r.name: r.weight for r in rewards if r.name in found}
    weighted = sum(weights[name] * value for name, value in found.items())
    return Reward(weighted / sum(weights.values()) if combine == "mean" else weighted, values)


def scorer_of(reward: FunctionReward | ModelReward | UrlReward, field: str) -> FunctionScorer | ModelScorer | UrlScorer:
    """Raises ConfigError when a function does not resolve."""
    if isinstance(reward, FunctionReward):
        return FunctionScorer(reward, f"{field}.function")
    return ModelScorer(reward) if isinstance(reward, ModelReward) else UrlScorer(reward)


def guarded(run: Call, items: list[Item], reward: RewardConfig) -> list[Part]:
    """Call in a thread of its own with a time limit, turn whatever goes wrong into failed rewards, and normalise."""
    name, timeout_s = reward.name, reward.timeout_s
    answer: list[Any] = []
    problem: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(run(items))
        except BaseException as error:  # also SystemExit of a careless reward function
            problem.append(error)

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return [(None, f"took longer than {timeout_s:g} s (rewards.{name}.timeout_s)")] * len(items)
    if problem and len(items) > 1:  # the fault of one completion is not that of its group
        return [guarded(run, [item], reward)[0] for item in items]
    if problem:
        return [(None, f"{type(problem[0]).__name__}: {problem[0]}")] * len(items)
    values = answer[0]
    if not isinstance(values, Sequence) or len(values) != len(items):
        size = len(values) if isinstance(values, Sequence) else type(values).__name__
        return [(None, f"gave {size} values for {len(items)} completions")] * len(items)
    return [_number(v, reward) for v in values]


def _number(value: Any, reward: RewardConfig) -> Part:
    if isinstance(value, Reward):
        if value.total is None:
            return None, value.error
        value = value.total
    if value is None:
        return None, "gave None"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None, f"gave {value!r}, which is no number"
    return ((number - reward.center) / reward.scale, None) if math.isfinite(number) else (None, f"gave {number}")


class FunctionScorer:
    """A Python function, plain or async, called with lists: f(prompts, completions, **columns, **arguments). Those written for
    verl and OpenRLHF are called as they expect."""

    def __init__(self, reward: FunctionReward, field: str) -> None:
        self.function, self.arguments = adapted(load_function(reward.function, field)), reward.arguments

    def __call__(self, items: list[Item]) -> list[Any]:
        names = sorted({name for item in items for name in item.columns} - set(self.arguments))
        columns = {name: [item.columns.get(name) for item in items] for name in names}
        columns |= {"task": [item.task for item in items]} if "task" not in columns else {}
        answer = self.function([i.prompt for i in items], [i.completion for i in items], **columns, **self.arguments)
        if inspect.isawaitable(answer):
            answer = asyncio.run(_finish(answer))
        return list(answer)


async def _finish(answer: Any) -> Any:
    return await answer


class UrlScorer:
    """An endpoint in OpenRLHF's format: {"query", "prompts", "labels"} -> {"rewards"}."""

    def __init__(self, reward: UrlReward) -> None:
        self.reward = reward

    def __call__(self, items: list[Item]) -> list[Any]:
        body = {
            "query": [i.prompt + i.completion + i.ending for i in items],
            "prompts": [i.prompt for i in items],
            "labels": [i.columns.get(self.reward.label) for i in items],
        }
        r = self.reward
        one_try = r.timeout_s / (len(r.urls) + 1)  # so that there is time for another when one hangs
        answer = post(r.urls, body, api_key_env=r.token_env, timeout_s=one_try, tries=r.tries)
        return list(answer["rewards"])


class ModelScorer:
    """A sequence-classification model with one label, loaded at the first call."""

    def __init__(self, reward: ModelReward) -> None:
        self.reward = reward
        self.model: Any = None

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
            raise ValueError(f"{self.reward.path} has {model.config.num_labels} labels; a reward model has one")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(self.device).eval()

    def text(self, item: Item) -> tuple[str, bool]:
        """What the model reads, and whether the tokenizer adds its special tokens: through the chat template, unless it
        comes from a caller who has done that (its prompt holds special tokens, or is not told apart from the completion)."""
        tokenizer = self.tokenizer
        if not item.prompt or any(token in item.prompt for token in tokenizer.all_special_tokens):
            text = item.prompt + item.completion + item.ending
            return text, not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.completion}]
            return str(tokenizer.apply_chat_template(messages, tokenize=False)), False
        return f"{item.prompt}\n{item.completion}", True

    def __call__(self, items: list[Item]) -> list[Any]:
        import torch

        from frpo.packing import micro_batches

        self.load()
        texts = map(self.text, items)
        rows = [self.tokenizer(t, truncation=True, max_length=self.reward.max_tokens, add_special_tokens=special) for t, special in texts]
        scores: list[Any] = [None] * len(items)
        for batch in micro_batches([len(r["input_ids"]) for r in rows], self.reward.batch_tokens, stretch=STRETCH):
            padded = self.tokenizer.pad([rows[i] for i in batch], return_tensors="pt").to(self.device)
            with torch.no_grad():
                logits = self.model(**padded).logits[:, 0].float()
            for i, value in zip(batch, torch.sigmoid(logits) if self.reward.squash == "sigmoid" else logits, strict=True):
                scores[i] = float(value)
        return scores
