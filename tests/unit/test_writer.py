"""Checkpoints are written from copies: training may change what it saved, and the digests are those of what
is on disk."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from frpo.actors import _writer
from frpo.actors._writer import Writer, on_host
from frpo.disk import sha256_of


def test_what_is_written_is_what_was_saved_whatever_happens_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write = _writer.write_hashed
    monkeypatch.setattr(
        _writer, "write_hashed", lambda state, path: (may_write.wait(60), write(state, path))[1]
    )
    writer, weights = Writer(), torch.arange(6.0)
    writer.create(None)  # type: ignore[arg-type]
    writer.save({"weights": weights, "step": 3}, str(tmp_path / "a"))
    writer.save({"weights": weights[2:4]}, str(tmp_path / "b"))
    weights.zero_()
    assert writer.written() is None
    may_write.set()
    writer.close()
    files = writer.written()
    assert files is not None
    assert [(f.path, f.size, f.sha256) for f in files] == [
        (str(p), p.stat().st_size, sha256_of(p)) for p in (tmp_path / "a", tmp_path / "b")
    ]
    whole, view = (writer.load(str(tmp_path / name)) for name in "ab")
    assert (whole["weights"].tolist(), whole["step"], view["weights"].tolist()) == (
        [0, 1, 2, 3, 4, 5],
        3,
        [2, 3],
    )
    assert (tmp_path / "b").stat().st_size < (
        tmp_path / "a"
    ).stat().st_size + 8  # a view alone, not all that it lies in


def test_containers_are_new_and_shared_memory_stays_shared() -> None:
    tied = torch.ones(3, requires_grad=True)
    state: dict[str, Any] = {
        "a": OrderedDict(x=tied.detach()),
        "b": [tied.detach(), (torch.zeros(2), "word")],
        "c": torch.empty(0),
    }
    copy = on_host(state)
    assert type(copy["a"]) is OrderedDict
    assert copy["a"]["x"] is copy["b"][0]
    assert copy["a"]["x"].data_ptr() != tied.data_ptr()
    state["a"]["y"] = 1
    state["b"].append(2)
    assert (list(copy["a"]), len(copy["b"]), copy["b"][1][1]) == (["x"], 2, "word")


def test_a_file_that_cannot_be_written_is_said_when_the_files_are_asked_for(tmp_path: Path) -> None:
    writer = Writer()
    writer.create(None)  # type: ignore[arg-type]
    writer.save({}, str(tmp_path / "missing" / "a"))
    writer.close()
    with pytest.raises(FileNotFoundError, match="missing"):
        writer.written()


def test_what_the_disk_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    """torch says "unexpected pos" of a file that ends early, be the disk full or its size limited."""
    state = {f"layer {i}": torch.randn(30_000) for i in range(10)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _writer.write_hashed(state, tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _writer.write_hashed(state, tmp_path / "state").size > 1_200_000
