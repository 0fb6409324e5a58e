"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from tests.support.command_line import CommandLine


@pytest.fixture
def frpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)
