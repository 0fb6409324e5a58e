"""Finds a reward function by `module:function` or `file.py:function`, before anything expensive starts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any

from frpo.config import ConfigError
from frpo.rewards.parts import reason

Function = Callable[..., Any]


def load_function(spec: str, field: str = "rewards.function") -> Function:
    """Raises ConfigError naming field, value and remedy when there is no such function."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place:
        raise ConfigError(f"{field}: {spec!r}; write module:function or file.py:function")
    try:
        with chdir(
            "."
        ):  # where the user's code goes elsewhere, relative paths would mean something else from then on
            module = (
                _from_file(Path(place).expanduser(), field)
                if place.endswith(".py")
                else importlib.import_module(place)
            )
        function = getattr(module, name, None)
    except ConfigError:
        raise
    except (
        BaseException
    ) as error:  # user code: whatever it raises on import, SystemExit too, is the user's to see
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"{field}: {place!r} cannot be imported: {reason(error)}") from None
    if not callable(function):
        known = [n for n in vars(module) if inspect.isfunction(getattr(module, n)) and not n.startswith("_")]
        raise ConfigError(
            f"{field}: {place} has no function {name!r}; it has {', '.join(known[:12]) or 'none'}"
        )
    found: Function = function
    return found


def _from_file(path: Path, field: str) -> ModuleType:
    """The file as `import` of its name from its folder would give it: dataclasses, pickle and its neighbours
    find what they need.

    The folder stays on the path, behind what is installed; it comes first while the file is read, as for a
    script.
    """
    if not path.is_file():
        raise ConfigError(
            f"{field}: no such file {path}; give the path from where you run, or an absolute one"
        )
    path = path.resolve()
    folder, name = str(path.parent), module_name(path)
    if (known := sys.modules.get(name)) is not None:
        return known
    _forget_neighbours_of_others(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec, path
    assert spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    FOLDERS.add(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # for what the functions import when they are called
    return module


FOLDERS: set[Path] = set()
"""Folders of the files loaded so far."""


def module_name(path: Path) -> str:
    """The file's own name; with a mark of its folder where another module has that name already, or is
    installed under it."""
    marked = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    known = sys.modules.get(path.stem)
    if known is not None:
        return path.stem if _file(known) == path else marked
    try:
        found = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    free = path.stem.isidentifier() and (
        found is None or (found.origin is not None and Path(found.origin).resolve() == path)
    )
    return path.stem if free else marked


def _file(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name else None


def _forget_neighbours_of_others(folder: Path) -> None:
    """Modules that other reward files imported from their own folders, where this folder has another of that
    name."""
    for name, module in list(sys.modules.items()):
        file = _file(module) if (folder / f"{name}.py").is_file() else None
        if file and file.parent in FOLDERS - {folder}:
            del sys.modules[name]
