"""Crash-safe checkpoints.

A checkpoint is written aside, while training goes on, listed in a manifest with sizes and SHA-256, flushed to
disk and then renamed; a reader takes the newest whose manifest verifies. Knows nothing of what is inside: the
writer is a callback. On several nodes the run folder must lie on a file system that all of them share.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from frpo.disk import sha256_of, sync_file, sync_folder
from frpo.records import Evaluation
from frpo.roles import WorkerFailed, Writing
from frpo.types import Steering, Written


class Progress(BaseModel):
    """The driver's own state in a checkpoint. The prompt position, seeds and policy version all follow from
    the step."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # older checkpoints have a field more

    step: int
    """Steps done."""
    evaluations: tuple[Evaluation, ...]
    """Measured in this stage so far (downstream marks)."""
    steering: Steering | None
    """For stages that run the loop."""
    num_workers: int | None = None
    """Ranks that wrote the engine's files; None in checkpoints of before this was written down."""
    zero_stage: int | None = None
    """As num_workers."""


STEP = r"step-\d{8,}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of checkpoints, the newest last; not what else somebody has put beside them."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(STEP, path.name) and path.is_dir())


def progress_of(checkpoint: Path) -> Progress | None:
    """None where it is torn."""
    try:
        return Progress.model_validate_json((checkpoint / "progress.json").read_text())
    except (OSError, ValueError):
        return None


FAILED_LIMIT_S = 60.0
"""Longest wait for a checkpoint that is being written when training has failed."""


@dataclass(frozen=True)
class Begun:
    """A checkpoint that is being written."""

    progress: Progress
    aside: Path
    """Its folder until all is written."""
    writing: Writing


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    path: Path
    progress: Progress


class Checkpoints:
    """Checkpoints of one stage: `step-00000050/` with the engine's files, progress.json and manifest.json.
    One is written at a time."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last
        self.begun: Begun | None = None

    def begin(self, progress: Progress, write: Callable[[Path], Writing]) -> None:
        """Let `write` begin to fill a folder aside; `poll` or `finish` makes it the newest checkpoint."""
        self.finish()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".tmp-{progress.step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        self.begun = Begun(progress, aside, write(aside))

    def poll(self) -> None:
        """Finish the checkpoint that was begun, if all is written."""
        if self.begun and self.begun.writing.ready():
            self.finish()

    def finish(self, limit_s: float | None = None) -> None:
        """Wait for the checkpoint that was begun, make it the newest, and delete those no longer kept. Raises
        as the writers do, and OSError for a file that one has written and that is not here."""
        if self.begun:
            begun = self.begun
            self.begun = None
            self._complete(begun.progress, begun.aside, begun.writing.result(limit_s))

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
            with waiting(f"writing the checkpoint of step {self.begun.progress.step}"):
                self.finish()

    def _complete(self, progress: Progress, aside: Path, written: list[Written]) -> None:
        (aside / "progress.json").write_text(progress.model_dump_json())
        manifest = aside / "manifest.json"
        manifest.write_text(json.dumps(_manifest_of(aside, written)))
        _sync_all(aside)
        final = self._path(progress.step)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync_folder(self.folder)
        self._prune()

    def latest(self, tell: Callable[[str], object] = lambda _: None) -> Saved | None:
        """The newest checkpoint whose manifest verifies, or None. Tells of each that is passed over."""
        for path in reversed(checkpoints_in(self.folder)):
            progress = progress_of(path)
            if progress and _is_intact(path):
                return Saved(path, progress)
            tell(f"{path} is not what was written there, and is passed over")
        return None

    def clear(self, *, but_newest: bool = False) -> None:
        """Delete all of them, or all but the newest."""
        checkpoints = checkpoints_in(self.folder)
        gone = checkpoints[:-1] if but_newest and checkpoints else [self.folder]
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _prune(self) -> None:
        for left in self.folder.glob(".tmp-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        for path in checkpoints_in(self.folder)[: -self.keep_last]:
            shutil.rmtree(path)


def _manifest_of(folder: Path, written: list[Written]) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file by its path in the folder; as their writers tell, or read here. Raises
    OSError for a file that one has written and that is not here."""
    told = {Path(file.path).resolve(): [file.size, file.sha256] for file in written}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lost = told.keys() - {path.resolve() for path in files}
    if lost:
        raise OSError(
            f"{min(lost)} was written on another node and is not here; the run folder must lie on a file "
            "system that all nodes share"
        )
    manifest = {}
    for path in files:
        entry = told.get(path.resolve()) or [path.stat().st_size, sha256_of(path)]
        manifest[str(path.relative_to(folder))] = entry
    return manifest


def _sync_all(folder: Path) -> None:
    """Files first, then the folders that name them, the deepest first."""
    folders = [folder]
    for path in folder.rglob("*"):
        if path.is_dir():
            folders.append(path)
        elif path.is_file():
            sync_file(path)
    for path in sorted(folders, reverse=True):
        sync_folder(path)


def _is_intact(checkpoint: Path) -> bool:
    """Whether all files of its manifest are there with the bytes that were written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        return all(_is_whole(checkpoint / name, size, digest) for name, (size, digest) in manifest.items())
    except (OSError, ValueError, AttributeError, TypeError):  # torn, or JSON of another shape
        return False


def _is_whole(path: Path, size: int, digest: str) -> bool:
    return path.stat().st_size == size and sha256_of(path) == digest
