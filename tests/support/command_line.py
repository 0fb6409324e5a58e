"""The command line in the test's own process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from frpo.cli import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class CommandLine:
    """The command line in this process, for what it does before anything starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("COLUMNS", "200")

    def __call__(self, *args: str) -> Ended:
        self.monkeypatch.setattr(sys, "argv", ["frpo", *args])
        with pytest.raises(SystemExit) as end:
            main()
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, printed.out, printed.err)

    def refuses(self, *args: str) -> str:
        """What it wrote to stderr with exit code 2."""
        done = self(*args)
        assert done.code == 2, done
        return done.err
