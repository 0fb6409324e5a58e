"""Where every random number comes from: a hash of the run's seed and of what it is for, so that a restart
loses nothing."""

from __future__ import annotations

import hashlib


def derive(*parts: int | str) -> int:
    """A seed in [0, 2^63) whose low 16 bits are 0: engines add the completion's index, and ranges must not
    overlap."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 17 << 16
