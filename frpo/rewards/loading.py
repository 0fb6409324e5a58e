"""Finds a reward function by `module:function` or `file.py:function`, before anything expensive starts."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frpo.config import ConfigError

Function = Callable[..., Any]


def load_function(spec: str, field: str = "rewards.function") -> Function:
    """Raises ConfigError naming field, value and remedy when there is no such function."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place:
        raise ConfigError(f"{field}: {spec!r}; write module:function or file.py:function")
    try:
        module = _from_file(Path(place), field) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except Exception as error:  # user code: whatever it raises on import is the user's to see
        raise ConfigError(f"{field}: {place!r} cannot be imported: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n in vars(module) if inspect.isfunction(getattr(module, n)) and not n.startswith("_")]
        raise ConfigError(f"{field}: {place} has no function {name!r}; it has {', '.join(known[:12]) or 'none'}")
    found: Function = function
    return found


def _from_file(path: Path, field: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"{field}: no such file {path}; give the path from where you run, or an absolute one")
    spec = importlib.util.spec_from_file_location(f"frpo_reward_{path.stem}", path)
    assert spec, path
    assert spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
