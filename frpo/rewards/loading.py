"""Finds a reward function by `module:function` or `file.py:function`, before anything expensive starts."""

from __future__ import annotations

import dis
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from frpo.config import ConfigError
from frpo.rewards.parts import describe_error

Function = Callable[..., Any]


def load_function(spec: str, field: str = "rewards.function") -> Function:
    """Raises ConfigError naming field, value and remedy when there is no such function."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place:
        raise ConfigError(f"{field}: {spec!r}; write module:function or file.py:function")
    try:
        # where the user's code goes elsewhere, relative paths would mean something else from then on
        with chdir("."):
            module = _import_place(place, field)
        function = getattr(module, name, None)
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # what the user's code raises on import, SystemExit too, is theirs to see
        raise ConfigError(f"{field}: {place!r} cannot be imported: {describe_error(error)}") from None
    if not callable(function):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        known = [name for name in functions if not name.startswith("_")]
        raise ConfigError(
            f"{field}: {place} has no function {name!r}; it has {', '.join(known[:12]) or 'none'}"
        )
    return cast(Function, function)


def _import_place(place: str, field: str) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(Path(place).expanduser(), field)
    return importlib.import_module(place)


def _import_file(path: Path, field: str) -> ModuleType:
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
    folder = str(path.parent)
    name = module_name(path)
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
    return path.stem if _is_free(path) else marked


def _is_free(path: Path) -> bool:
    """Whether an import of the file's name finds nothing else."""
    known = sys.modules.get(path.stem)
    if known is not None:
        return _file_of(known) == path
    if not path.stem.isidentifier():
        return False
    try:
        spec = importlib.util.find_spec(path.stem)
    except (ImportError, ValueError):
        return True
    if spec is None:
        return True
    return spec.origin is not None and Path(spec.origin).resolve() == path


def _file_of(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name else None


def _forget_neighbours_of_others(folder: Path) -> None:
    """Modules that other reward files imported from their own folders, where this folder has another of that
    name."""
    for name, module in list(sys.modules.items()):
        if not (folder / f"{name}.py").is_file():
            continue
        file = _file_of(module)
        if file and file.parent in FOLDERS - {folder}:
            del sys.modules[name]


def imports_of(function: Function) -> list[str]:
    """Absolute names of the modules that the body of a function, or of an object's __call__, imports."""
    while isinstance(function, partial):
        function = function.func
    body = inspect.unwrap(function) if inspect.isroutine(function) else type(function).__call__
    code = getattr(body, "__code__", None)
    if code is None:
        return []
    steps = list(dis.get_instructions(code))
    # IMPORT_NAME follows the level, two constants earlier: 0 for an absolute import
    levels = [None, None, *(step.argval for step in steps)]
    absolute = [step for step, level in zip(steps, levels, strict=False) if level == 0]
    return [step.argval for step in absolute if step.opname == "IMPORT_NAME"]
