"""Do memory, descriptors and files stay flat over a long run?

    python benchmarks/soak.py --steps 2000 --out docs/results

Runs the testbed with one arm and no fine-tune, looks at every process of the run and at its folder each ten
seconds, and writes soak.json and soak.png.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import psutil

from frpo.metrics import read_steps
from frpo.records import to_json
from frpo.report.drawing import PAPER, add_legend, colour_of, save_png

ROOT = Path(__file__).parents[1]
ARM = "[{name: frpo, objective: {estimator: {lam: 0.5}, beta: 0.6, penalty: reverse}}]"
EVERY_S = 10.0
STAGE = "rlhf/frpo"
DRIVER = "driver"


def start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    settings = (
        f"learner.num_steps={steps}",
        f"arms={ARM}",
        "downstream=[]",
        "certify=null",
        "attack=null",
        "checkpoint.every=50",
        "evaluate.validate_every=100",
    )
    command = [
        sys.executable,
        "-m",
        "frpo",
        "run",
        str(ROOT / "recipes" / "testbed.yaml"),
        "--run-dir",
        str(folder),
    ]
    for setting in settings:
        command += ["--set", setting]
    with folder.with_suffix(".out").open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def look(process: psutil.Process, folder: Path) -> dict[str, Any] | None:
    """One row, or None before the first step."""
    steps = read_steps(folder, STAGE) if (folder / "metrics.jsonl").exists() else []
    if not steps:
        return None
    row: dict[str, Any] = {"step": steps[-1].step, "mib": {}, "descriptors": {}}
    for role, each in find_roles(process):
        row["mib"][role] = each.memory_info().rss / 2**20
        row["descriptors"][role] = each.num_fds()
    row["files"] = sum(path.is_file() for path in folder.rglob("*"))
    row["shared_memory_mib"] = psutil.disk_usage("/dev/shm").used / 2**20
    return row


def find_roles(process: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    yield DRIVER, process
    for each in process.children(recursive=True):
        try:
            name = re.match(r"ray::(\w+?)Worker\b", " ".join(each.cmdline()))
        except psutil.NoSuchProcess:
            continue
        if name:
            yield name[1].lower(), each


def watch(process: subprocess.Popen[bytes], folder: Path) -> list[dict[str, Any]]:
    rows = []
    while process.poll() is None:
        time.sleep(EVERY_S)
        try:
            row = look(psutil.Process(process.pid), folder)
        except psutil.NoSuchProcess:
            break
        if row and (not rows or row["mib"].keys() >= rows[-1]["mib"].keys()):  # none has ended
            rows.append(row)
            print(
                row["step"], {role: round(mib) for role, mib in row["mib"].items()}, row["files"], flush=True
            )
    return rows


def growth_of(rows: Sequence[dict[str, Any]], what: str) -> dict[str, dict[str, float]]:
    """By role: the level at the middle of the run, and its slope from there on, per 1,000 steps."""
    late = [row for row in rows if row["step"] >= rows[-1]["step"] / 2]
    grown = {}
    for role in sorted(set.intersection(*(set(row[what]) for row in late))):
        slope, _ = np.polyfit([row["step"] for row in late], [row[what][role] for row in late], 1)
        grown[role] = {"level": late[0][what][role], "per_1000_steps": float(slope) * 1000}
    return grown


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    with plt.rc_context(PAPER):
        figure, grid = plt.subplots(1, 2, figsize=(9, 3.2))
        for axes, what, label in zip(
            grid, ("mib", "descriptors"), ("resident memory, MiB", "open descriptors"), strict=True
        ):
            for i, role in enumerate(sorted(rows[-1][what])):
                own = [row for row in rows if role in row[what]]
                axes.plot(
                    [r["step"] for r in own], [r[what][role] for r in own], color=colour_of(i), label=role
                )
            axes.set(xlabel="step", title=label)
            axes.set_ylim(bottom=0)
        figure.tight_layout()
        add_legend(grid[0])
        save_png(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "soak"
        process = start(folder, given.steps)
        try:
            rows = watch(process, folder)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)
        if process.returncode:
            sys.exit(folder.with_suffix(".out").read_text()[-2000:])
    result = {
        "steps": given.steps,
        "growth": {what: growth_of(rows, what) for what in ("mib", "descriptors")},
        "rows": rows,
    }
    (given.out / "soak.json").write_text(to_json(result) + "\n")
    draw(rows, given.out / "soak.png")


if __name__ == "__main__":
    main()
