"""Reads what a growing file of lines has gained."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class News:
    """What a look at a file has brought."""

    lines: tuple[str, ...] = ()
    anew: bool = False
    """The file is another than before: `lines` are all that it holds, and what was read earlier is void."""

    def __bool__(self) -> bool:
        return bool(self.lines) or self.anew


class Tail:
    """Whole lines of a file, each once. A last line without its end is left until that is written.

    A run rewrites its files only to drop lines, and no two lines are alike: so a file that still has the line
    that was read last in the place where it stood is the same up to there, also where it was copied anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.last = b""
        """The line that ends at `offset`."""
        self.seen: tuple[int, int, int] | None = None
        """Inode, size and time of change when it was last read."""

    def read(self) -> News:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if seen == self.seen:
                    return News()
                self.seen = seen
                file.seek(self.offset - len(self.last))
                anew = file.read(len(self.last)) != self.last
                if anew:
                    file.seek(0)
                    self.offset, self.last = 0, b""
                data = file.read()
        except OSError:  # not there yet, or not any more
            gone = self.offset > 0
            self.offset, self.last, self.seen = 0, b"", None
            return News(anew=gone)
        *lines, torn = data.split(b"\n")
        if lines:
            self.offset += len(data) - len(torn)
            self.last = lines[-1] + b"\n"
        return News(tuple(line.decode("utf-8", errors="replace") for line in lines), anew)
