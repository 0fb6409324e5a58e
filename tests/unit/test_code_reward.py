"""Code that models write: what passes, what fails, and what it can't do to the machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from frpo.config import ConfigError
from frpo.rewards import code

needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed; code never runs without it"
)
ROW: dict[str, list[Any]] = {
    "entry_point": ["half"],
    "canonical_solution": ["def half(xs):\n    return [x / 2 for x in xs]\n"],
    "base_input": [[[[2, 4]], [[]]]],
    "plus_input": [[[[1, 3, 0.1]]]],
    "atol": [1e-6],
}


def score(completion: str, **arguments: Any) -> float | None:
    return code.evalplus(
        ["..."], [completion], **ROW, **{"allow_code_execution": True, "timeout_s": 2.0, **arguments}
    )[0]


@needs_bwrap
@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("def half(xs):\n    return [x * 0.5 for x in xs]", 1.0),
        ("Here it is:\n```python\ndef half(xs):\n    return [0.5 * x + 1e-9 for x in xs]\n```\nDone.", 1.0),
        ("def half(xs):\n    return [x // 2 for x in xs]", 0.0),
        ("def half(xs):\n    return tuple(x / 2 for x in xs)", 0.0),
        ("def third(xs):\n    return xs", 0.0),
        ("def half(xs) return", 0.0),
        ("def half(xs):\n    while True: pass", 0.0),
        ("def half(xs):\n    return [0] * 10**10", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("import sys\nprint('[1.0, 2.0]')\nsys.exit(0)", 0.0),
    ],
)
def test_scores(completion: str, expected: float) -> None:
    assert score(completion) == expected


@needs_bwrap
def test_a_candidate_reaches_neither_files_nor_network(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("1")
    right = "    return [x / 2 for x in xs]"
    write = f"try:\n    open({str(tmp_path / 'written')!r}, 'w').write('x')\nexcept OSError:\n    pass\n"
    read = f"import os\nassert not os.path.exists({str(secret)!r})\nassert not os.environ.get('HOME')\n"
    network = (
        "import socket\n"
        "try:\n"
        "    socket.create_connection(('127.0.0.1', 22), 1)\n"
        "except OSError as e:\n"
        "    assert e.errno == 101 or e.errno == 111\n"
    )
    assert score(write + read + network + "def half(xs):\n" + right) == 1.0
    assert not (tmp_path / "written").exists()


def test_it_is_off_until_the_recipe_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"arguments\.allow_code_execution: this reward runs code that models write"
    ):
        code.check_evalplus({})
    with pytest.raises(RuntimeError, match="allow_code_execution is off"):
        score("x", allow_code_execution=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="install the package bubblewrap"):
        code.check_evalplus({"allow_code_execution": True})


def test_floats_are_compared_as_evalplus_does() -> None:
    assert code.is_equal("[0.3, 1]", "[0.30000000000000004, 1]", 0.0)
    assert not code.is_equal("[0.31]", "[0.3]", 1e-6)
    assert code.is_equal("{1, 2}", "{2, 1}", 0.0)
    assert not code.is_equal("<object>", "[1]", 0.0)
