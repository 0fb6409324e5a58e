"""The models that a configuration names: their hub names are found once, before anything is planned; what
comes after sees folders alone.

The bases of adapters are found with them. Imports no ML library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from frpo import hub, saved
from frpo.config import Config, ModelReward

R = TypeVar("R")


def resolved(config: Config) -> Config:
    """Folders in place of hub names; what is in no cache is downloaded. Raises as `hub.local_folder`."""
    return _with(config, [_folder(given, field, download=True) for field, given in _named(config)])


def cached(config: Config) -> tuple[Config, list[hub.NotCached]]:
    """The same with what is in the cache, and what to say of each name that is not, which stays a name.
    Downloads nothing."""
    paths, missing = list[str](), list[hub.NotCached]()
    for field, given in _named(config):
        try:
            paths.append(_folder(given, field, download=False))
        except hub.NotCached as error:
            paths.append(error.name)
            missing.append(error)
    return _with(config, paths), missing


def named(config: Config) -> Config:
    """The other way round, for people and other nodes: organisation/name@commit in place of folders in a
    cache."""
    return _with(config, [hub.name_of(path) or path for _, path in _named(config)])


def rewards_resolved(rewards: Sequence[R]) -> tuple[R, ...]:
    """Folders in place of the hub names of reward models. Raises as `hub.local_folder`."""
    return _rewards_with(
        rewards, [_folder(given, field, download=True) for field, given in _reward_models(rewards)]
    )


def _folder(given: str, field: str, *, download: bool) -> str:
    folder = hub.local_folder(given, field, download=download)
    saved.base(folder, download=download)
    return str(folder) if hub.is_name(given) or given.startswith("~") else given


def _named(config: Config) -> list[tuple[str, str]]:
    return [("model.path", config.model.path), *_reward_models(config.rewards)]


def _reward_models(rewards: Sequence[object]) -> list[tuple[str, str]]:
    return [(f"rewards.{i}.path", r.path) for i, r in enumerate(rewards) if isinstance(r, ModelReward)]


def _with(config: Config, paths: Sequence[str]) -> Config:
    model = config.model.model_copy(update={"path": paths[0]})
    return config.model_copy(update={"model": model, "rewards": _rewards_with(config.rewards, paths[1:])})


def _rewards_with(rewards: Sequence[R], paths: Sequence[str]) -> tuple[R, ...]:
    left = iter(paths)
    return tuple(
        r.model_copy(update={"path": next(left)}) if isinstance(r, ModelReward) else r for r in rewards
    )
