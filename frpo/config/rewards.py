"""Rewards: Python functions, sequence-classification models, judges, and endpoints of others."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from frpo.config.section import NOTHING, Content, PathText, Positive, PositiveFloat, Section, Share
from frpo.config.training import Workers

Combine = Literal["weighted", "mean", "product"]


def _check_address(url: str) -> str:
    """Raises ValueError for what no request can be sent to, and for one with a password."""
    if not url.startswith(("http://", "https://")) or not url.isprintable() or " " in url:
        raise ValueError(
            f"{url!r} is no http:// or https:// address, such as http://127.0.0.1:8000/get_reward"
        )
    if "@" in url.split("/")[2]:
        raise ValueError(
            "an address with a password ends up in logs and run folders; put it into the variable that "
            "token_env or api_key_env names"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port  # raises for one out of range
        host.encode("idna")
    except ValueError as error:
        raise ValueError(
            f"{url!r} cannot be called ({error}); write it as http://127.0.0.1:8000/get_reward"
        ) from None
    if not host:
        raise ValueError(f"{url!r} names no host; write it as http://127.0.0.1:8000/get_reward")
    return url


Address = Annotated[str, AfterValidator(_check_address)]
"""Of an endpoint."""


class RewardSection(Section):
    """What all kinds of reward share."""

    name: Annotated[str, NOTHING] = Field(min_length=1)
    """Name in metrics and reports."""
    weight: float = 1.0
    """Factor in the total."""
    center: float = 0.0
    """Taken from each value, then divided by scale: such as the mean of a reward model on known answers."""
    scale: PositiveFloat = 1.0
    """Divides each value: such as its standard deviation."""
    tasks: tuple[str, ...] = ()
    """Tasks it applies to; empty: all."""
    timeout_s: Annotated[PositiveFloat, NOTHING] = 60.0
    """A call that takes longer is killed, its completions are tried one by one within as much time again, and
    those that still take too long have failed."""


class FunctionReward(RewardSection):
    kind: Literal["function"]
    """A Python function."""
    function: Annotated[PathText, Content("code")]
    """module:function, or file.py:function: f(prompts=, completions=, column=, ...) -> one float per
    completion, or None where it does not apply to the row (TRL's shape, called by keyword), or verl's
    compute_score, or OpenRLHF's reward_func. Also a class, or a function that makes one of arguments."""
    arguments: dict[str, Any] = {}
    """Keyword arguments given on every call; to a class, those that its constructor names."""


class ModelReward(RewardSection):
    kind: Literal["model"]
    """A sequence-classification model with one label."""
    path: Annotated[PathText, Content("model")]
    """Hugging Face folder, or hub name as for model.path."""
    squash: Literal["none", "sigmoid"] = "sigmoid"
    """sigmoid maps the logit to [0, 1], which the certificate needs."""
    max_tokens: Positive = 1024
    """Prompt and completion together; longer texts lose their beginning."""
    batch_tokens: Annotated[Positive, NOTHING] = 8192
    """Padded tokens in one forward pass."""


class JudgeReward(Workers, RewardSection):
    """A language model that is asked about each completion. It has vLLM engines of its own in the run's
    cluster, or in the service's."""

    kind: Literal["judge"]
    """A language model that judges, in the words and with the answers of a template."""
    path: Annotated[PathText, Content("model")]
    """Hugging Face folder, or hub name as for model.path."""
    template: Annotated[PathText, Content("template")]
    """strongreject, harmbench, or a YAML file of your own: what the judge is asked, the only answers that it
    can give, and what each is worth."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and activations; null: float32 on CPUs, bfloat16 on GPUs."""
    max_tokens: Positive = 2048
    """Longest question and answer together; a completion whose question is longer has no score."""
    gpu_memory_utilization: Annotated[Share | None, NOTHING] = None
    """Share of GPU memory for an engine's weights and KV cache; null: nine tenths of num_gpus."""
    kv_cache_gib: Annotated[Positive, NOTHING] = 1
    """KV cache on the CPU, GiB."""
    timeout_s: Annotated[PositiveFloat, NOTHING] = 60.0
    """Completions that are not judged so long after the engine took their group have failed."""

    @property
    def memory_share(self) -> float:
        """Of a GPU, for weights and KV cache."""
        return self.gpu_memory_utilization or 0.9 * self.num_gpus

    @property
    def weights_dtype(self) -> Literal["float32", "bfloat16"]:
        return self.dtype or ("bfloat16" if self.num_gpus > 0 else "float32")

    @model_validator(mode="after")
    def _fits_a_card(self) -> JudgeReward:
        if self.num_gpus > 1:
            raise ValueError(
                f"num_gpus: {self.num_gpus:g}, and an engine of a judge computes on one GPU; raise "
                "num_workers instead"
            )
        return self


class UrlReward(RewardSection):
    kind: Literal["url"]
    """An endpoint that speaks OpenRLHF's get_reward format: `frpo serve`, or anyone's."""
    urls: Annotated[tuple[Address, ...], NOTHING] = Field(min_length=1)
    """Asked in turn until one answers. Which rewards stand behind them is not known here: whoever changes
    those chooses another folder."""
    label: str = "answer"
    """Column that is sent as labels."""
    token_env: Annotated[str, NOTHING] = "FRPO_SERVICE_TOKEN"
    """Environment variable with the bearer token, if it asks for one."""
    tries: Annotated[Positive, NOTHING] = 5
    """Rounds over all URLs, with longer pauses between them."""


class ServeReward(RewardSection):
    kind: Literal["serve"]
    """A reward service in the same Ray cluster, called by its Serve handle, without HTTP and token."""
    app: str = "frpo-rewards"
    """Name of the Serve application; `frpo serve` starts it under the default."""
    rewards: tuple[str, ...] = ()
    """Those of its rewards that are asked for; empty: all that apply to the task."""


RewardConfig = Annotated[
    FunctionReward | ModelReward | JudgeReward | UrlReward | ServeReward, Field(discriminator="kind")
]


def check_names(where: str, names: Sequence[str]) -> None:
    """Raises ValueError for a name that stands twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} stands twice; give each its own")


def check_combination(rewards: tuple[RewardConfig, ...], combine: Combine) -> None:
    """Raises ValueError for names that stand twice and for weights that would be left unused."""
    check_names("rewards", [r.name for r in rewards])
    for reward in rewards:
        field = f"rewards.{reward.name}.weight"
        if combine == "mean" and reward.weight <= 0:
            raise ValueError(f"{field}: {reward.weight:g} in a mean; give a weight above 0")
        if combine == "product" and reward.weight != 1:
            raise ValueError(f"{field}: {reward.weight:g} has no meaning in a product; leave it out")
