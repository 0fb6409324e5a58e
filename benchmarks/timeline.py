"""Ten steps of each run on one axis of time, one run above the other: what a step waits for.

    python benchmarks/timeline.py runs/sync runs/ahead -o docs/results/timeline.png

Of the first arm that a run has trained, from its metrics alone: the run may still be going on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from frpo.metrics import read_steps
from frpo.report.timeline import Timeline, describe_timeline
from frpo.report.timeline_plots import save_timelines, say_shares
from frpo.rows import read_rows


def read_timeline(folder: Path) -> Timeline:
    """Ends the program where the run has no step yet."""
    stages = (row["stage"] for row in read_rows(folder) if row["kind"] == "step")
    stage = next((stage for stage in stages if stage.startswith("rlhf/")), "")
    timeline = describe_timeline(stage.removeprefix("rlhf/"), read_steps(folder, stage))
    if timeline is None:
        raise SystemExit(f"{folder} has no step of an arm")
    return timeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PNG")
    given = parser.parse_args()
    timelines = {folder.name: read_timeline(folder) for folder in given.runs}
    for name, timeline in timelines.items():
        print(say_shares(name, timeline))
    save_timelines(timelines, given.out)


if __name__ == "__main__":
    main()
