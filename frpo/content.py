"""What the things that a recipe names hold: one digest for a model, a data set, reward code or a benchmark
task, wherever it lies.

Digests of files are remembered by path, size and times of change, so that a model of many GB is read once.
Imports no ML library. What cannot be read from here (a hub name, an endpoint, a server's rewards) counts by
its name.
"""

from __future__ import annotations

import ast
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
from frpo.disk import sha256_of, sha256_of_json, write_text
from frpo.harness import data_files, modules_of, read_task
from frpo.rewards import gym
from frpo.rewards.template import template_file

MODEL_FILES = (
    "config.json", "generation_config.json", saved.ADAPTER, "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template.*",
)  # fmt: skip
REMEMBERED = "hashes.json"
OURS = Path(__file__).parent
IMPORTERS = ("import_module", "__import__")


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
            stat = path.stat()
            key = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
            if key not in self.used:
                self.used[key] = self.known.get(key) or _sha256_once(path, key)
        except OSError:
            return "missing"
        return self.used[key]

    def files(self, paths: Iterable[Path], root: Path) -> str:
        """One digest over files and their names below `root`."""
        return sha256_of_json([(str(path.relative_to(root)), self.file(path)) for path in sorted(set(paths))])

    def save(self) -> None:
        if self.used != self.known:
            write_text(self.file_, json.dumps(self.used, indent=0))

    def of(self, what: Content, value: Any) -> str:
        """The digest of what a field marked with `what` names. Raises ConfigError for a `testbed:` name that
        there is not."""
        if what.of == "tasks":
            return sha256_of_json(
                [self._task(Path(name)) if Path(name).is_file() else name for name in value]
            )
        if str(value).startswith("testbed:"):
            return sha256_of_json([testbed.checked_path(value), _digest_of_testbed()])
        if what.of == "model":
            return self._model(value)
        if what.of == "template":
            return self.file(template_file(value))
        if what.of == "data":
            return self._data(value)
        return self._code(value)

    def _model(self, name: str, above: tuple[Path, ...] = ()) -> str:
        """Configuration, tokenizer and weights; of an adapter how it is applied, and its base wherever that
        lies. `above` are the adapters that stand on it."""
        folder = Path(name)
        if not folder.is_dir() or folder in above:
            return name
        files = set[Path]()
        for pattern in MODEL_FILES:
            files.update(path for path in folder.glob(pattern) if path.is_file())
        if not saved.is_adapter(folder):
            return self.files(files, folder)
        try:
            own = self.files(files - {folder / saved.ADAPTER}, folder)
            applied = saved.adapter_settings(folder)
            base = saved.parent_of(folder, download=False)
            return sha256_of_json([own, applied, self._model(str(base), (*above, folder))])
        except ConfigError:  # torn, or its base is not here: said elsewhere
            return self.files(files, folder)

    def _data(self, name: str) -> str:
        """A file by its bytes, a folder by those of all its files but caches, a generator by its version;
        other names as they are."""
        path = Path(name)
        if name.startswith(gym.SCHEME):
            return sha256_of_json([name, _version_of("reasoning_gym")])
        if path.is_file():
            return self.file(path)
        if not path.is_dir():
            return name
        files = [file for file in path.rglob("*") if file.is_file() and not _is_cache(file.relative_to(path))]
        return self.files(files, path)

    def _code(self, spec: str) -> str:
        """The function's name, its file, and every file that it imports from its own folder. Of an installed
        package the module's file and the package's version. Names of files do not count."""
        place, _, name = spec.rpartition(":")
        found = _find_code(place)
        if found is None:
            return spec
        file, top = found
        if _is_installed(place, file):
            return sha256_of_json([name, self.file(file), _version_of(place.split(".")[0])])
        return sha256_of_json([name, self._imports(file, top)])

    def _imports(self, file: Path, top: Path) -> list[str]:
        return sorted(self.file(path) for path in local_imports(file, top))

    def _task(self, file: Path, above: tuple[Path, ...] = ()) -> str:
        """A task file of lm-evaluation-harness, the data files that it names, and what it includes or calls
        beside it. `above` are the files that include it."""
        parts = [self.file(file)]
        try:
            tree = read_task(file)
        except ConfigError:  # said elsewhere
            return sha256_of_json(parts)
        parts += [self.file(Path(name)) for name in data_files(tree)]
        if isinstance(tree.get("include"), str):
            included = file.parent / tree["include"]
            if included.is_file() and included not in (file, *above):
                parts.append(self._task(included, (*above, file)))
        for module in sorted(modules_of(tree)):
            parts += self._imports(file.parent / f"{module.replace('.', '/')}.py", file.parent)
        return sha256_of_json(parts)


@cache
def _sha256_once(path: Path, key: str) -> str:
    """Of a file that has not changed since `key` was made; the seeds of a sweep share it."""
    return sha256_of(path)


@cache
def _digest_of_testbed() -> str:
    items = (*testbed.harmful_items(), *testbed.harmless_items(), *testbed.downstream_items())
    return sha256_of_json([asdict(item) for item in items])


def _is_cache(path: Path) -> bool:
    """Files that the datasets and hub libraries leave in a folder."""
    return path.match("cache-*.arrow") or any(part.startswith(".") for part in path.parts)


def code_files(spec: str) -> dict[str, Path]:
    """The user's files behind a function, its own and those that it imports from beside it, by their paths as
    a recipe has them, or from the folder of the function where that is absolute. None of what is installed,
    or comes with frpo."""
    place = spec.rpartition(":")[0]
    found = _find_code(place)
    if found is None or _is_installed(place, found[0]) or found[0].is_relative_to(OURS):
        return {}
    file, top = found
    folder = Path(place).parent if place.endswith(".py") and not Path(place).is_absolute() else Path()
    return {str(folder / path.relative_to(top)): path for path in sorted(local_imports(file, top))}


def _find_code(place: str) -> tuple[Path, Path] | None:
    """Of file.py or a module: its file, and the folder from which it names its neighbours."""
    if place.endswith(".py"):
        file = Path(place).resolve()  # its neighbours are those of the file itself, not of a link to it
        return file, file.parent
    source = _source_of(place)
    if source is None:
        return None
    depth = len(place.split(".")) - (source.name != "__init__.py")
    return source, source.parents[depth]


def _is_installed(place: str, file: Path) -> bool:
    """Whether a module is of a package that is not ours; what is named by its file is the user's."""
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return bool(installed) and not place.endswith(".py") and not file.is_relative_to(OURS)


def _source_of(module: str) -> Path | None:
    """Its file, found without running it (the packages that hold it are imported)."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # the user's packages may raise anything; that it cannot be imported is said elsewhere
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _version_of(package: str) -> str:
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
    read = set[Path]()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in read:
            continue
        read.add(path)
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for level, name in _imports_in(tree):
            above = path.parents[level - 1] if 0 < level <= len(path.parents) else top
            for module in _files_behind(above, name):
                if module.is_relative_to(own) and module.is_relative_to(OURS) == own.is_relative_to(OURS):
                    waiting.append(module)
    return read


def _imports_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(dots, dotted name) of every import statement, and of importlib.import_module("name")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            inside = f"{node.module}." if node.module else ""
            for alias in node.names:
                yield node.level, inside + alias.name
        elif isinstance(node, ast.Call) and node.args and _name_of(node.func) in IMPORTERS:
            given = node.args[0]
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                yield 0, given.value


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _files_behind(above: Path, name: str) -> Iterator[Path]:
    """Files behind a dotted name: its packages on the way, and the last part that is a module."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        place = above.joinpath(*parts[:depth])
        for file in (place.with_name(place.name + ".py"), place / "__init__.py"):
            if file.is_file():
                yield file
