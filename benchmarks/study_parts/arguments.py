"""What a study's command is given."""

from __future__ import annotations

import argparse
from pathlib import Path

from .seeds import Measure, Seed, read_seeds


def ask_for_seeds(description: str | None, study: str, measure: Measure) -> tuple[list[Seed], Path]:
    """The seeds that are kept or that a sweep has finished, and the folder to write to. Ends the process
    where there are none."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="of the sweep; without one, the seeds kept in --out"
    )
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    seeds = read_seeds(given.out / study, given.folder, measure)
    if not seeds:
        parser.error(f"no finished seed in {given.folder}, and none kept in {given.out / study}")
    return seeds, given.out
