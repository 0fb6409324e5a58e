"""Host memory of every actor of a run, the most that each had, beside what `frpo plan` predicts.

    python benchmarks/memory.py recipes/testbed.yaml --out memory.json --set learner.num_steps=4

Runs `frpo run` and looks at its actors ten times a second. Counted is the memory that a process has to itself
(RssAnon in /proc/PID/status): libraries and the object store are shared by all of a machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from frpo.forecast import estimate_host_needs
from frpo.planning import plan_run
from frpo.recipe import load_recipe
from frpo.resources import read_shape

ROLES = {
    "RolloutWorker": "rollout",
    "LearnerWorker": "learner",
    "FinetuneWorker": "finetune",
    "ReferenceWorker": "reference",
    "EvaluateWorker": "evaluate",
    "RewardWorker": "reward",
}


def read_memory(pid: Path) -> tuple[str, float] | None:
    """Role and GiB of a process; None for one that is no actor of ours, or has ended."""
    try:
        title = (pid / "cmdline").read_text().replace("\0", " ")
        role = next((role for name, role in ROLES.items() if title.startswith(f"ray::{name}")), None)
        lines = (pid / "status").read_text().splitlines() if role else []
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return (role, kib[0] / 2**20) if role and kib else None


def measure_peaks(command: list[str]) -> dict[str, float]:
    """GiB by role while the command runs. Raises CalledProcessError where it fails."""
    most: dict[str, float] = {}
    with subprocess.Popen(command) as run:
        while run.poll() is None:
            for role, gib in filter(None, map(read_memory, Path("/proc").glob("[0-9]*"))):
                most[role] = max(most.get(role, 0.0), gib)
            time.sleep(0.1)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--name", help="of the row in the file")
    parser.add_argument("--out", type=Path, help="JSON file; the row is added to it")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="FIELD=VALUE")
    asked = parser.parse_args()
    config = load_recipe(Path(asked.recipe), tuple(asked.sets))
    with tempfile.TemporaryDirectory() as folder:
        words = itertools.chain.from_iterable(("--set", text) for text in asked.sets)
        command = [sys.executable, "-m", "frpo", "run", asked.recipe, "--run-dir", f"{folder}/run", *words]
        measured = measure_peaks(command)
    sizes = read_shape(config)
    predicted = (
        {need.role: need.gib for need in estimate_host_needs(config, sizes, plan_run(config))}
        if sizes
        else {}
    )
    row = {
        role: {"measured_gib": gib, "predicted_gib": predicted.get(role)}
        for role, gib in sorted(measured.items())
    }
    print(json.dumps(row, indent=1))
    if asked.out:
        rows = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
        asked.out.write_text(json.dumps(rows | {asked.name or config.name: row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
