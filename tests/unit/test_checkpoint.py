"""Checkpoints survive a crash at any point; a run folder has one owner."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from frpo import rundir
from frpo.checkpoint import Checkpoints, Progress
from frpo.config import ConfigError
from frpo.types import Steering, Written


def progress(step: int) -> Progress:
    return Progress(step=step, evaluations=(), steering=Steering(beta=0.1, centre=0.1, lam=None))


class Writing:
    """A file that is on disk once somebody waits for it, or after some looks."""

    def __init__(self, folder: Path, text: str, looks: int = 0) -> None:
        (folder / "engine").mkdir()
        self.file, self.text, self.looks = folder / "engine" / "weights", text, looks

    def ready(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def result(self, limit_s: float | None = None) -> list[Written]:
        self.file.write_text(self.text)
        return [Written(str(self.file), len(self.text), hashlib.sha256(self.text.encode()).hexdigest())]


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.begin(progress(step), lambda folder: Writing(folder, f"weights of {step}"))
    checkpoints.finish()


def newest(checkpoints: Checkpoints) -> int | None:
    latest = checkpoints.latest()
    return latest and latest.progress.step


def test_a_checkpoint_counts_when_it_is_written_and_training_goes_on_meanwhile(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.begin(progress(10), lambda folder: Writing(folder, "ten", looks=2))
    for _ in range(2):
        checkpoints.poll()
        assert newest(checkpoints) is None
    checkpoints.poll()
    assert newest(checkpoints) == 10
    checkpoints.begin(progress(20), lambda folder: Writing(folder, "twenty", looks=9))
    checkpoints.begin(
        progress(30), lambda folder: Writing(folder, "thirty", looks=9)
    )  # the last is finished first
    assert newest(checkpoints) == 20
    checkpoints.finish()
    assert newest(checkpoints) == 30


def test_the_manifest_holds_what_the_writer_tells_and_the_rest_is_hashed(tmp_path: Path) -> None:
    """A rank that tells of other bytes than there are: the disk has lost some, and the checkpoint does not
    count."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)

    class Wrong(Writing):
        def result(self, limit_s: float | None = None) -> list[Written]:
            (written,) = super().result()
            return [replace(written, sha256="0" * 64)]

    save(checkpoints, 10)
    manifest = json.loads((tmp_path / "step-00000010" / "manifest.json").read_text())
    assert sorted(manifest) == ["engine/weights", "progress.json"]
    checkpoints.begin(progress(20), lambda folder: Wrong(folder, "text"))
    checkpoints.finish()
    assert newest(checkpoints) == 10


def test_a_file_of_another_node_that_is_not_here_is_named(tmp_path: Path) -> None:
    class Elsewhere(Writing):
        def result(self, limit_s: float | None = None) -> list[Written]:
            return [*super().result(), Written(str(tmp_path / "elsewhere"), 1, "0" * 64)]

    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.begin(progress(10), lambda folder: Elsewhere(folder, "text"))
    with pytest.raises(
        OSError,
        match=r"elsewhere was written on another node and is not here; "
        r"the run folder must lie on a file system",
    ):
        checkpoints.finish()
    assert newest(checkpoints) is None


def test_latest_is_the_newest_that_verifies(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    assert checkpoints.latest() is None
    for step in (10, 20, 30):
        save(checkpoints, step)
    (tmp_path / "step-00000030" / "engine" / "weights").write_text("weights of 3x")
    (tmp_path / ".tmp-00000040").mkdir()
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.progress == progress(20)
    assert (latest.path / "engine" / "weights").read_text() == "weights of 20"
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.progress.step == 10


def test_a_flipped_bit_in_any_file_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 10)
    save(checkpoints, 20)
    files = [path for path in (tmp_path / "step-00000020").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"weights", "progress.json", "manifest.json"}
    for path in files:
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            told: list[str] = []
            latest = checkpoints.latest(told.append)
            assert latest is not None
            assert latest.progress.step == 10, f"{path.name}, byte {at}"
            passed_over = tmp_path / "step-00000020"
            assert told == [f"{passed_over} is not what was written there, and is passed over"]
        path.write_bytes(whole)
    assert newest(checkpoints) == 20


def test_a_writer_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 10)

    def broken(folder: Path) -> Writing:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.begin(progress(20), broken)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.progress.step == 10
    save(checkpoints, 20)  # the left-over folder is in nobody's way
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.progress.step == 20
    assert not (latest.path / "half").exists()


def test_keeps_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000030", "step-00000040"]


def test_a_checkpoint_with_a_field_of_another_version_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 10)
    path = tmp_path / "step-00000010"
    told = json.loads((path / "progress.json").read_text()) | {"validation": 0.4}
    (path / "progress.json").write_text(json.dumps(told))
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "progress.json").read_bytes()
    manifest["progress.json"] = [len(content), hashlib.sha256(content).hexdigest()]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert newest(checkpoints) == 10


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    with rundir.hold_folder(tmp_path):
        code = (
            "from pathlib import Path\n"
            "from frpo import rundir\n"
            f"with rundir.hold_folder(Path({str(tmp_path)!r})): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert other.returncode == 1
    assert f"{tmp_path} is in use by process" in other.stderr
    with rundir.hold_folder(tmp_path):
        pass


def test_an_unwritable_run_folder_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"run_dir: .* cannot be written"),
        rundir.hold_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_the_newest_alone_is_kept_where_a_stage_may_go_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    for step in (10, 20, 30):
        save(checkpoints, step)
    checkpoints.clear(but_newest=True)
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-00000030"]
    assert checkpoints.latest() is not None
    checkpoints.clear()
    assert not checkpoints.folder.exists()
