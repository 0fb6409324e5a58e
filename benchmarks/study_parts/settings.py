"""A study of several settings: the same arms, two seeds at a time, under each."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .seeds import Measure, Seed, read_seeds

AT_ONCE = 2
"""Seeds of a sweep: as many as run beside each other on two cores."""


@dataclass(frozen=True)
class Setting:
    name: str
    sets: tuple[str, ...]
    """Assignments of `frpo sweep --set`: what is otherwise than in the recipe."""

    def has(self, seed: Seed) -> bool:
        return any(arm.startswith(f"{self.name}/") for arm in seed.arms)


def measure_settings(
    recipe: str, settings: Sequence[Setting], seeds: range, folder: Path, kept: Path, measure: Measure
) -> list[Seed]:
    """Sweeps in `folder` for what is missing in `kept`: the first seeds of every setting, then the next. Arms
    are kept as "<setting>/<arm>"."""
    measured = read_seeds(kept, None, measure)
    for first, setting in itertools.product(seeds[::AT_ONCE], settings):
        done = {seed.seed for seed in measured if setting.has(seed)}
        missing = range(first, min(first + AT_ONCE, seeds.stop))
        if done.issuperset(missing):
            continue
        runs = folder / f"{setting.name}-{first}"
        command = [sys.executable, "-m", "frpo", "sweep", recipe, "--seeds", str(len(missing))]
        command += ["--run-dir", str(runs)]
        for assignment in (f"seed={first}", *setting.sets):
            command += ["--set", assignment]
        subprocess.run(command, check=True)
        measured = read_seeds(kept, runs, measure, prefix=f"{setting.name}/")
    return measured
