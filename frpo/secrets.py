"""What the actors of rewards must know and nobody else may read: tokens and keys of endpoints.

They are taken from the environment of the process that starts a run or a service, since a cluster that is
joined lacks them, and travel as a constructor's argument: a runtime_env would show them in the dashboard.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frpo.config import ConfigError, FunctionReward, Missing, RewardConfig, UrlReward
from frpo.rewards.loading import load_function

ALWAYS = ("HF_TOKEN",)
"""Of downloads on the nodes."""
ENV = "_env"
"""How the argument of a reward function ends that names an environment variable: api_key_env."""
SECRET = re.compile(r"(key|token|secret|password|credential|authorization)s?$", re.IGNORECASE)
"""Names of arguments whose text nobody else may read. One that ends in _env names a variable, and stays."""
LEFT_OUT = "left-out"


@dataclass(frozen=True, repr=False)
class Secrets:
    """Environment variables. What prints it, prints their names."""

    values: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self.values)})"

    def place(self) -> None:
        """Set them in this process's environment, which the processes that it starts inherit."""
        os.environ.update(self.values)


NO_SECRETS = Secrets({})


@dataclass(frozen=True)
class Named:
    """An environment variable that a reward names."""

    field: str
    variable: str
    on_purpose: bool
    """Whether the configuration names it. A default names what an endpoint may not ask for."""


def secrets_of(rewards: Sequence[RewardConfig]) -> Secrets:
    """Those that the rewards name, as far as this process has them.

    Raises Missing for one that is named on purpose and not set, ConfigError for a function that does not
    resolve.
    """
    values = {name: os.environ[name] for name in ALWAYS if name in os.environ}
    for i, reward in enumerate(rewards):
        for named in variables_of(reward, f"rewards.{i}"):
            value = os.environ.get(named.variable, "")
            if value:
                values[named.variable] = value
            elif named.on_purpose:
                raise Missing(
                    f"{named.field}: the environment variable {named.variable} is not set; export it where "
                    "you start frpo"
                )
    return Secrets(values)


def hide_secrets(value: Any, name: str = "") -> Any:
    """A tree of plain values with LEFT_OUT in place of each text whose name, or that of what holds it, is
    that of a secret. `name` is that of the value itself."""
    if isinstance(value, Mapping):
        inside = name if SECRET.search(name) else ""
        return {key: hide_secrets(item, inside or str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_secrets(item, name) for item in value]
    return LEFT_OUT if isinstance(value, str) and SECRET.search(name) else value


def variables_of(reward: RewardConfig, field: str) -> Iterator[Named]:
    """Those that a reward names. Raises ConfigError when its function does not resolve."""
    if isinstance(reward, UrlReward) and reward.token_env:
        yield Named(f"{field}.token_env", reward.token_env, "token_env" in reward.model_fields_set)
    if isinstance(reward, FunctionReward):
        arguments = defaults_of(reward, f"{field}.function") | reward.arguments
        for name, value in arguments.items():
            if name.endswith(ENV) and isinstance(value, str) and value:
                yield Named(f"{field}.arguments.{name}", value, name in reward.arguments)


def defaults_of(reward: FunctionReward, field: str) -> dict[str, Any]:
    """Of the parameters of a reward function. Raises ConfigError when it does not resolve."""
    try:
        parameters = inspect.signature(load_function(reward.function, field)).parameters
    except ConfigError:
        raise
    except (TypeError, ValueError):  # built in: no signature can be told
        return {}
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
