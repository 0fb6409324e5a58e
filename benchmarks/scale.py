"""The real loops at scale: what they make of engines and learners, on virtual time, and what they cost
their own process, on the real clock.

    python benchmarks/scale.py --out docs/results/scale.json --plot docs/results/scale.png  # half an hour
    python benchmarks/scale.py --quick  # less than a minute

Prints one JSON. `use` and `nemo` play `driver.train` and `driver_ahead.train_ahead` with the real Window,
EngineSession and make_batch against partners that live on a clock of their own: an engine decodes b
sequences in steps of 8.5 ms + 35 us b (measured on an H100 within a tenth), a completion of any length is
one token that stands for it. `driver` draws completions of 1,500 tokens from engines that answer at once,
in the driver's process and through Ray: few actors answer for many engines, so that what the engines do
themselves is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_parts.driver import measure_alone
from scale_parts.nemo import measure_nemo
from scale_parts.picture import draw_use
from scale_parts.ray_engines import measure_with_ray
from scale_parts.use import measure_use


def measure_driver(quick: bool) -> dict[str, Any]:
    """Goal: 50 us a completion, however many engines there are."""
    return {"goal_us": 50, "alone": measure_alone(quick), "with_ray": measure_with_ray(quick)}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "use": measure_use,
    "nemo": measure_nemo,
    "driver": measure_driver,
}


def shorten_figures(value: Any) -> Any:
    """The same with four digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [shorten_figures(each) for each in value]
    if isinstance(value, dict):
        return {name: shorten_figures(each) for name, each in value.items()}
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer engines and scenarios")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, help="JSON file; parts that are not measured stay in it")
    parser.add_argument("--plot", type=Path, help="PNG of what `use` measured")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    if asked.out and asked.out.exists():
        figures = json.loads(asked.out.read_text())
    for part in asked.parts.split(","):
        began = time.perf_counter()
        figures[part] = shorten_figures(PARTS[part](asked.quick))
        print(f" {part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(figures, indent=1) + "\n")
    if asked.plot:
        draw_use(figures["use"], asked.plot)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
