"""What the things that a recipe names hold: one digest for a model, a data set, reward code or a benchmark
task, wherever it lies.

Digests of files are remembered by path, size and times of change, so that a model of many GB is read once.
Imports no ML library. What cannot be read from here (a hub name, an endpoint, a server's rewards) counts by
its name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from frpo import saved, testbed
from frpo.config import ConfigError
from frpo.config.section import Content
from frpo.disk import sha256, write_text
from frpo.harness import data_files, modules_of, read_task
from frpo.rewards import gym

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    saved.ADAPTER,
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
)
REMEMBERED = "hashes.json"
OURS = Path(__file__).parent


class Digests:
    """Digests of files. `folder` is where they are remembered, such as the run folder; nothing is written but
    by `save`."""

    def __init__(self, folder: Path) -> None:
        self.file_ = folder / REMEMBERED
        try:
            self.known: dict[str, str] = dict(json.loads(self.file_.read_text()))
        except (OSError, ValueError, TypeError):
            self.known = {}
        self.used: dict[str, str] = {}

    def file(self, path: Path) -> str:
        """SHA-256 of a file's bytes; "missing" where it cannot be read."""
        try:
            found = path.stat()
            key = f"{path.absolute()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
            if key not in self.used:
                self.used[key] = self.known.get(key) or _sha256(path, key)
        except OSError:
            return "missing"
        return self.used[key]

    def files(self, paths: Iterable[Path], root: Path) -> str:
        """One digest over files and their names below `root`."""
        return _hash([(str(p.relative_to(root)), self.file(p)) for p in sorted(set(paths))])

    def save(self) -> None:
        if self.used != self.known:
            write_text(self.file_, json.dumps(self.used, indent=0))

    def of(self, what: Content, value: Any) -> str:
        """The digest of what a field marked with `what` names. Raises ConfigError for a `testbed:` name that
        there is not."""
        if what.of == "tasks":
            return _hash([self._task(Path(v)) if Path(v).is_file() else v for v in value])
        if str(value).startswith("testbed:"):
            return _hash([testbed.known(value), _testbed()])
        if what.of == "model":
            return self._model(value)
        return self._data(value) if what.of == "data" else self._code(value)

    def _model(self, name: str, above: tuple[Path, ...] = ()) -> str:
        """Configuration, tokenizer and weights; of an adapter how it is applied, and its base wherever that
        lies. `above` are the adapters that stand on it."""
        folder = Path(name)
        if not folder.is_dir() or folder in above:
            return name
        files = {p for pattern in MODEL_FILES for p in folder.glob(pattern) if p.is_file()}
        if not saved.is_adapter(folder):
            return self.files(files, folder)
        try:
            parts = [self.files(files - {folder / saved.ADAPTER}, folder), saved.applied(folder)]
            return _hash([*parts, self._model(str(saved.parent(folder, download=False)), (*above, folder))])
        except ConfigError:  # torn, or its base is not here: said elsewhere
            return self.files(files, folder)

    def _data(self, name: str) -> str:
        """A file by its bytes, a folder by those of all its files but caches, a generator by its version;
        other names as they are."""
        path = Path(name)
        if name.startswith(gym.SCHEME):
            return _hash([name, _version("reasoning_gym")])
        if not path.is_dir():
            return self.file(path) if path.is_file() else name
        inside = (p for p in path.rglob("*") if p.is_file())
        return self.files((p for p in inside if not _is_cache(p.relative_to(path))), path)

    def _code(self, spec: str) -> str:
        """The function's name, its file, and every file that it imports from its own folder. Of an installed
        package the module's file and the package's version. Names of files do not count."""
        place, _, name = spec.rpartition(":")
        if place.endswith(".py"):
            file = Path(place).resolve()  # its neighbours are those of the file itself, not of a link to it
            return _hash([name, self._imports(file, file.parent)])
        found = _source_of(place)
        if found is None:
            return spec
        if {"site-packages", "dist-packages"} & set(found.parts) and not found.is_relative_to(OURS):
            return _hash([name, self.file(found), _version(place.split(".")[0])])
        depth = len(place.split(".")) - (found.name != "__init__.py")
        return _hash([name, self._imports(found, found.parents[depth])])

    def _imports(self, file: Path, top: Path) -> list[str]:
        return sorted(self.file(p) for p in local_imports(file, top))

    def _task(self, file: Path, above: tuple[Path, ...] = ()) -> str:
        """A task file of lm-evaluation-harness, the data files that it names, and what it includes or calls
        beside it. `above` are the files that include it."""
        found = [self.file(file)]
        try:
            tree = read_task(file)
        except ConfigError:  # said elsewhere
            return _hash(found)
        found += [self.file(Path(name)) for name in data_files(tree)]
        included = tree.get("include")
        if (
            isinstance(included, str)
            and (other := file.parent / included).is_file()
            and other not in (file, *above)
        ):
            found.append(self._task(other, (*above, file)))
        for module in sorted(modules_of(tree)):
            found += self._imports(file.parent / f"{module.replace('.', '/')}.py", file.parent)
        return _hash(found)


@cache
def _sha256(path: Path, key: str) -> str:
    """Of a file that has not changed since `key` was made; the seeds of a sweep share it."""
    return sha256(path)


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _testbed() -> str:
    return _hash([asdict(i) for i in (*testbed.harmful(), *testbed.harmless(), *testbed.downstream())])


def _is_cache(path: Path) -> bool:
    """Files that the datasets and hub libraries leave in a folder."""
    return path.match("cache-*.arrow") or any(part.startswith(".") for part in path.parts)


def _source_of(module: str) -> Path | None:
    """Its file, found without running it (the packages that hold it are imported)."""
    try:
        spec = importlib.util.find_spec(module)
    except (
        Exception
    ):  # user code: whatever the packages around it raise; that it cannot be imported is said elsewhere
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _version(package: str) -> str:
    """Of the distribution that bears the package's name; empty where there is none (to look for others takes
    seconds)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---- imports of Python files


def local_imports(file: Path, top: Path) -> set[Path]:
    """The file and all that it imports from below `top`, directly or not, found by reading: nothing is run.
    Of frpo itself only what lies in the file's own folder."""
    own = file.parent if file.is_relative_to(OURS) else top
    found, waiting = set[Path](), [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for level, name in _imported(tree):
            above = path.parents[level - 1] if 0 < level <= len(path.parents) else top
            waiting += [
                p
                for p in _modules(above, name)
                if p.is_relative_to(own) and p.is_relative_to(OURS) == own.is_relative_to(OURS)
            ]
    return found


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(dots, dotted name) of every import statement, and of importlib.import_module("name")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = f"{node.module}." if node.module else ""
            yield from ((node.level, inside + a.name) for a in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__") and node.args:
            given = node.args[0]
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                yield 0, given.value


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _modules(above: Path, name: str) -> Iterator[Path]:
    """Files behind a dotted name: its packages on the way, and the last part that is a module."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        place = above.joinpath(*parts[:depth])
        for file in (place.with_name(place.name + ".py"), place / "__init__.py"):
            if file.is_file():
                yield file
