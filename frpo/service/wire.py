"""What callers send and get: the service's own format, OpenRLHF's, vLLM's /classify (verl), and slime's.

Every format becomes Items and comes back from Rewards; nothing else knows the difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from frpo.scoring import Item
from frpo.types import Reward

Columns = dict[str, Any]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Loose(BaseModel):
    """Formats of others: fields that we do not know are let be."""

    model_config = ConfigDict(extra="ignore")


# ---- our own


class Message(Loose):
    role: str
    content: str


class ScoreItem(Wire):
    prompt: str | list[Message]
    """A string, or chat messages; functions and models see the last user message."""
    completion: str
    task: str = ""
    """Routes rewards, as in a recipe."""
    columns: Columns = {}
    """What the reward functions ask for besides: answer, label, ..."""


class ScoreRequest(Wire):
    items: list[ScoreItem]
    rewards: list[str] | None = None
    """Names; null: all. Each scores the items whose task it applies to."""


class Score(Wire):
    score: float | None
    """Weighted sum of the parts; null when one of them failed."""
    parts: dict[str, float | None]
    error: str | None = None
    """Why the score is null."""


class ScoreResponse(Wire):
    scores: list[Score]


class RewardInfo(Wire):
    name: str
    kind: str
    weight: float
    tasks: list[str]


class RewardsResponse(Wire):
    rewards: list[RewardInfo]


def text_of(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((m.content for m in reversed(prompt) if m.role == "user"), "")


def items_of_score(request: ScoreRequest) -> list[Item]:
    return [Item(text_of(i.prompt), i.completion, i.task, i.columns) for i in request.items]


def score_response(rewards: Sequence[Reward]) -> ScoreResponse:
    return ScoreResponse(scores=[Score(score=r.total, parts=dict(r.parts), error=r.error) for r in rewards])


# ---- OpenRLHF: POST {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}


class GetRewardRequest(Loose):
    query: list[str]
    """Prompt and completion in one string."""
    prompts: list[str] | None = None
    """Cut from the front of each query, where it stands there."""
    labels: list[Any] | None = None
    """Reach reward functions as columns label and answer."""

    @model_validator(mode="after")
    def _equal_lengths(self) -> GetRewardRequest:
        for name, column in (("prompts", self.prompts), ("labels", self.labels)):
            if column is not None and len(column) != len(self.query):
                raise ValueError(f"{name} has {len(column)} entries for {len(self.query)} queries")
        return self


class GetRewardResponse(Wire):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
    """Each part, where every item has it."""


def items_of_get_reward(request: GetRewardRequest) -> list[Item]:
    count = len(request.query)
    prompts, labels = request.prompts or [""] * count, request.labels or [None] * count
    return [_openrlhf_item(q, p, label) for q, p, label in zip(request.query, prompts, labels, strict=True)]


ENDING = re.compile(r"(?:\s*(?:<[|｜][^<>]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>))+\s*$")
"""End-of-text tokens of the common tokenizers: OpenRLHF sends what it decoded with them."""


def _openrlhf_item(query: str, prompt: str, label: Any) -> Item:
    columns = {} if label is None else {"label": label, "answer": label}
    completion = query.removeprefix(prompt)
    end = ENDING.search(completion)
    cut = end.start() if end else len(completion)
    return Item(prompt, completion[:cut], "", columns, completion[cut:])


def get_reward_response(rewards: Sequence[Reward]) -> GetRewardResponse:
    totals = [r.total for r in rewards if r.total is not None]
    names = {name for r in rewards for name in r.parts}
    logs = {n: [v for r in rewards if (v := r.parts.get(n)) is not None] for n in sorted(names)}
    return GetRewardResponse(rewards=totals, scores=totals, extra_logs={n: v for n, v in logs.items() if len(v) == len(rewards)})


# ---- vLLM's /classify, which verl's discriminative reward client calls


class ClassifyRequest(Loose):
    input: str | list[str]
    model: str | None = None
    """A reward's name; null or unknown to the service: all that apply."""


class Classification(Wire):
    index: int
    label: str
    probs: list[float]
    num_classes: int = 1


class Usage(Wire):
    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0


class ClassifyResponse(Wire):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage = Usage()


def items_of_classify(request: ClassifyRequest) -> list[Item]:
    texts = [request.input] if isinstance(request.input, str) else request.input
    return [Item("", text, "", {}) for text in texts]


# ---- slime: one {"prompt", "response", "label"} -> a number


class SlimeRequest(Loose):
    prompt: str | list[Message]
    response: str
    label: Any = None


def item_of_slime(request: SlimeRequest) -> Item:
    columns = {} if request.label is None else {"label": request.label, "answer": request.label}
    return Item(text_of(request.prompt), request.response, "", columns)


class ProblemDetail(Wire):
    type: str
    message: str


class Problem(Wire):
    error: ProblemDetail
