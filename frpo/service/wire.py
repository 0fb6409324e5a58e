"""What callers send and get: the service's own format, OpenRLHF's, vLLM's /classify (verl), slime's, and
OpenAI's chat with the models of judges.

Every format becomes Items and comes back from Rewards; nothing else knows the difference.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from frpo.types import Decoding, Item, Reply, Reward

Columns = dict[str, Any]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Loose(BaseModel):
    """Formats of others: fields that we do not know are let be."""

    model_config = ConfigDict(extra="ignore")


# ---- our own


class TextPart(Loose):
    """The one kind of part, of those that OpenAI's chat has, that is read here."""

    type: Literal["text"]
    text: str


class Message(Loose):
    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Conversation = Annotated[list[Message], Field(min_length=1, max_length=1024)]
"""Up to the completion, oldest first."""


class ScoreItem(Wire):
    prompt: str | Conversation
    """A string, or chat messages: models and functions see the whole conversation."""
    completion: str
    task: str = Field("", max_length=256)
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


def item_of(prompt: str | list[Message], completion: str, task: str, columns: Columns) -> Item:
    if isinstance(prompt, str):
        return Item(prompt, completion, task, columns)
    last = next((message.text for message in reversed(prompt) if message.role == "user"), "")
    return Item(last, completion, task, columns, messages=message_dicts(prompt), conversational=True)


def message_dicts(messages: Sequence[Message]) -> tuple[dict[str, str], ...]:
    return tuple({"role": message.role, "content": message.text} for message in messages)


def size_of(item: Item) -> int:
    """Characters of its prompt, or of its whole conversation, and of its completion."""
    size = len(item.completion) + len(item.ending)
    if not item.messages:
        return size + len(item.prompt)
    return size + sum(len(message["content"]) for message in item.messages)


def items_of_score(request: ScoreRequest) -> list[Item]:
    return [item_of(i.prompt, i.completion, i.task, i.columns) for i in request.items]


def score_response(rewards: Sequence[Reward]) -> ScoreResponse:
    scores = [Score(score=reward.total, parts=dict(reward.parts), error=reward.error) for reward in rewards]
    return ScoreResponse(scores=scores)


# ---- OpenRLHF: POST {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}


class GetRewardRequest(Loose):
    query: list[str]
    """Prompt and completion in one string."""
    prompts: list[str] | None = None
    """Cut from the front of each query, where it stands there."""
    labels: list[Any] | None = None
    """Reach reward functions as columns label and answer."""
    messages: list[Conversation | None] | None = None
    """frpo's own addition: the conversation before each completion, or null for a plain prompt."""

    @model_validator(mode="after")
    def _equal_lengths(self) -> GetRewardRequest:
        for name, column in (("prompts", self.prompts), ("labels", self.labels), ("messages", self.messages)):
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
    prompts = request.prompts or [""] * count
    labels = request.labels or [None] * count
    messages = request.messages or [None] * count
    return [_openrlhf_item(*given) for given in zip(request.query, prompts, labels, messages, strict=True)]


def _openrlhf_item(query: str, prompt: str, label: Any, messages: list[Message] | None) -> Item:
    completion = query.removeprefix(prompt)
    cut = ending_at(completion)
    return Item(
        prompt,
        completion[:cut],
        "",
        _label_columns(label),
        completion[cut:],
        messages=message_dicts(messages or ()),
    )


def _label_columns(label: Any) -> Columns:
    """The columns by which reward functions ask for a label."""
    if label is None:
        return {}
    return {"label": label, "answer": label}


ENDINGS = ("</s>", "<eos>", "<end_of_turn>")
BARS = "|｜"
LONGEST_NAME = 40


def ending_at(text: str) -> int:
    """Where the end-of-text tokens at the end begin, white space around them included; len(text) where there
    are none.

    OpenRLHF sends what it decoded with them. Those of the common tokenizers are known: ENDINGS, and <|a
    name|> with bars of either width. Looks at each character of them once, from the end.
    """
    cut = len(text)
    end = _without_space(text, cut)
    while size := _token_before(text, end):
        cut = end = _without_space(text, end - size)
    return cut


def _without_space(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _token_before(text: str, end: int) -> int:
    """Length of the token that ends there; 0 without one."""
    for token in ENDINGS:
        if text.endswith(token, 0, end):
            return len(token)
    begin = text.rfind("<", max(0, end - LONGEST_NAME - 4), end)
    barred = begin >= 0 and text[end - 1] == ">" and text[end - 2] in BARS and text[begin + 1] in BARS
    if not barred:
        return 0
    name = text[begin + 2 : end - 2]
    return end - begin if name and ">" not in name else 0


def get_reward_response(rewards: Sequence[Reward]) -> GetRewardResponse:
    totals = [reward.total for reward in rewards if reward.total is not None]
    logs = {}
    for name in sorted(set[str]().union(*(reward.parts for reward in rewards))):
        column = [reward.parts.get(name) for reward in rewards]
        values = [value for value in column if value is not None]
        if len(values) == len(rewards):
            logs[name] = values
    return GetRewardResponse(rewards=totals, scores=totals, extra_logs=logs)


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
    prompt: str | Conversation
    response: str
    label: Any = None


def item_of_slime(request: SlimeRequest) -> Item:
    return item_of(request.prompt, request.response, "", _label_columns(request.label))


# ---- OpenAI's chat completions, by which verl's generative reward functions ask a judge


class SchemaFormat(Loose):
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Loose):
    type: Literal["text", "json_schema"] = "text"
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and only there")
        return self


TokenCount = Annotated[int, Field(strict=True, ge=1, le=2**20)]


class ChatRequest(Loose):
    """null is what OpenAI's clients may send for a field that is left out."""

    messages: Conversation
    model: str | None = None
    """A judge's name; null where there is only one."""
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    """The same, as OpenAI names it now."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    """1, as is top_p, where it is not given."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    response_format: ResponseFormat | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    """One answer; ask again for another."""
    stream: StrictBool | None = None
    """The answer comes whole."""

    @model_validator(mode="after")
    def _whole(self) -> ChatRequest:
        if self.stream:
            raise ValueError("stream: the answer comes whole; leave it out")
        return self


class ChatMessage(Wire):
    role: str = "assistant"
    content: str


class ChatChoice(Wire):
    index: int = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]


class ChatResponse(Wire):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelInfo(Wire):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "frpo"


class ModelsResponse(Wire):
    object: str = "list"
    data: list[ModelInfo]


def decoding_of(request: ChatRequest) -> Decoding:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    form = request.response_format.json_schema if request.response_format else None
    return Decoding(
        max_tokens=request.max_completion_tokens or request.max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(text for text in stop if text),
        schema=form.schema_ if form else None,
    )


def chat_response(name: str, answer: Reply) -> ChatResponse:
    usage = Usage(
        prompt_tokens=answer.num_prompt_tokens,
        completion_tokens=answer.num_tokens,
        total_tokens=answer.num_prompt_tokens + answer.num_tokens,
    )
    choice = ChatChoice(
        message=ChatMessage(content=answer.text), finish_reason="length" if answer.cut else "stop"
    )
    return ChatResponse(
        id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=name, choices=[choice], usage=usage
    )


class ProblemDetail(Wire):
    type: str
    message: str


class Problem(Wire):
    error: ProblemDetail
