"""Rewards: Python functions and sequence-classification models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from frpo.config.section import Positive, PositiveFloat, Section


class Reward(Section):
    """What both kinds of reward share."""

    name: str
    """Name in metrics and reports."""
    weight: float = 1.0
    """Factor in the total."""
    tasks: tuple[str, ...] = ()
    """Tasks it applies to; empty: all."""
    timeout_s: PositiveFloat = 60.0
    """A call that takes longer is a failed reward."""


class FunctionReward(Reward):
    kind: Literal["function"]
    """A Python function."""
    function: str
    """module:function, or file.py:function: f(prompts, completions, **columns) -> list of float or None (TRL's shape), or verl's
    compute_score, or OpenRLHF's reward_func."""
    arguments: dict[str, Any] = {}
    """Keyword arguments given on every call."""


class ModelReward(Reward):
    kind: Literal["model"]
    """A sequence-classification model with one label."""
    path: str
    """Hugging Face folder or hub name."""
    squash: Literal["none", "sigmoid"] = "sigmoid"
    """sigmoid maps the logit to [0, 1], which the certificate needs."""
    max_tokens: Positive = 1024
    """Prompt and completion together; longer texts lose their beginning."""
    batch_tokens: Positive = 8192
    """Padded tokens in one forward pass."""


class UrlReward(Reward):
    kind: Literal["url"]
    """An endpoint that speaks OpenRLHF's get_reward format: `frpo serve`, or anyone's."""
    urls: tuple[str, ...] = Field(min_length=1)
    """Asked in turn until one answers."""
    label: str = "answer"
    """Column that is sent as labels."""
    token_env: str = "FRPO_SERVICE_TOKEN"
    """Environment variable with the bearer token, if it asks for one."""
    tries: Positive = 5
    """Rounds over all URLs, with longer pauses between them."""

    @field_validator("urls")
    @classmethod
    def _http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no http:// or https:// address, such as http://127.0.0.1:8000/get_reward")
        return urls


RewardConfig = Annotated[FunctionReward | ModelReward | UrlReward, Field(discriminator="kind")]
