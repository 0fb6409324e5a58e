"""A Hugging Face cache as the hub's download leaves it: blobs, a snapshot of links to them, and a ref."""

from __future__ import annotations

import hashlib
from pathlib import Path


def cache(
    folder: Path, name: str, model: Path, *, leave_out: tuple[str, ...] = (), ref: str | None = "main"
) -> Path:
    """Put a model's files into the cache at `folder` under a hub name; returns the snapshot, whose name is
    the commit."""
    home = folder / f"models--{name.replace('/', '--')}"
    files = {f.name: f.read_bytes() for f in sorted(model.iterdir()) if f.name not in leave_out}
    commit = hashlib.sha1(b"".join(files.values())).hexdigest()
    snapshot = home / "snapshots" / commit
    for part in (home / "blobs", home / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        (home / "blobs" / digest).write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/{digest}")
    if ref:
        (home / "refs" / ref).write_text(commit)
    return snapshot
