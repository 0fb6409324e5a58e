"""What the tests of the command line share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import shipped
from tests.support.command_line import CommandLine


@pytest.fixture
def frpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped.do_run(tmp_path_factory.mktemp("done") / "run")


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of fakes, to change at will."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"
