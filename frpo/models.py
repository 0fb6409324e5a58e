"""The models that a configuration names: their hub names are found once, before anything is planned; what
comes after sees folders alone.

The bases of adapters are found with them. Imports no ML library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from frpo import hub, saved
from frpo.config import Config, JudgeReward, ModelReward

R = TypeVar("R")


def resolve_models(config: Config) -> Config:
    """Folders in place of hub names; what is in no cache is downloaded. Raises as `hub.local_folder`."""
    folders = [_folder_of(given, field, download=True) for field, given in _models_of(config)]
    return _replace_paths(config, folders)


def find_cached_models(config: Config) -> tuple[Config, list[hub.NotCached]]:
    """The same with what is in the cache, and what to say of each name that is not, which stays a name.
    Downloads nothing."""
    paths = list[str]()
    missing = list[hub.NotCached]()
    for field, given in _models_of(config):
        try:
            paths.append(_folder_of(given, field, download=False))
        except hub.NotCached as error:
            paths.append(error.name)
            missing.append(error)
    return _replace_paths(config, paths), missing


def name_models(config: Config) -> Config:
    """The other way round, for people and other nodes: organisation/name@commit in place of folders in a
    cache."""
    return _replace_paths(config, [hub.name_of(path) or path for _, path in _models_of(config)])


def resolve_reward_models(rewards: Sequence[R]) -> tuple[R, ...]:
    """Folders in place of the hub names of reward models and judges. Raises as `hub.local_folder`."""
    folders = [_folder_of(given, field, download=True) for field, given in _reward_models(rewards)]
    return _replace_rewards(rewards, folders)


def _folder_of(given: str, field: str, *, download: bool) -> str:
    folder = hub.local_folder(given, field, download=download)
    saved.base_of(folder, download=download)
    is_elsewhere = hub.is_name(given) or given.startswith("~")
    return str(folder) if is_elsewhere else given


def _models_of(config: Config) -> list[tuple[str, str]]:
    """Field and path of each model that a configuration names."""
    return [("model.path", config.model.path), *_reward_models(config.rewards)]


def _reward_models(rewards: Sequence[object]) -> list[tuple[str, str]]:
    models = []
    for i, reward in enumerate(rewards):
        if isinstance(reward, ModelReward | JudgeReward):
            models.append((f"rewards.{i}.path", reward.path))
    return models


def _replace_paths(config: Config, paths: Sequence[str]) -> Config:
    model = config.model.model_copy(update={"path": paths[0]})
    return config.model_copy(update={"model": model, "rewards": _replace_rewards(config.rewards, paths[1:])})


def _replace_rewards(rewards: Sequence[R], paths: Sequence[str]) -> tuple[R, ...]:
    left = iter(paths)
    replaced: list[Any] = []
    for reward in rewards:
        if isinstance(reward, ModelReward | JudgeReward):
            replaced.append(reward.model_copy(update={"path": next(left)}))
        else:
            replaced.append(reward)
    return tuple(replaced)
