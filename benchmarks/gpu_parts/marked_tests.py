"""The tests marked gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_parts.card import time_call

PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=8", "tests/gpu")


def run_tests(work: Path, size: str) -> dict[str, Any]:
    env = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, *PYTEST]
    seconds, done = time_call(
        lambda: subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    )
    print(done.stdout[-5000:], done.stderr[-1000:])
    return {"seconds": round(seconds, 1), "summary": done.stdout.strip().splitlines()[-1]}
