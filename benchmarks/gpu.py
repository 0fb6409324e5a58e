"""What only a GPU can show, in one command of at most 8 minutes: figures for docs/results/gpu.json.

    python benchmarks/gpu.py --out docs/results/gpu.json             # one card of 80 GB
    python benchmarks/gpu.py --out /tmp/gpu.json --size tiny --cpu   # tries every line without one

Runs `frpo run` with all roles on one card (the testbed in float32 and in full; random Qwen2 weights in
bfloat16 with an adapter), then the learner's engine and vLLM on the same random weights, then the tests
marked gpu. Each part is a process with a time limit of its own, so that one which fails leaves the others'
figures; what a part measured stands in the file even when a later one is cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from gpu_parts.card import has_card
from gpu_parts.engine import measure_engine
from gpu_parts.learner import measure_kernels, measure_learner
from gpu_parts.marked_tests import run_tests
from gpu_parts.model import SIZES, write_model
from gpu_parts.runs import run_adapter, run_full

PARTS: dict[str, tuple[Callable[[Path, str], dict[str, Any]], int]] = {
    "run_full": (run_full, 130),
    "run_adapter": (run_adapter, 130),
    "learner": (measure_learner, 90),
    "kernels": (measure_kernels, 90),
    "engine": (measure_engine, 240),
    "tests": (run_tests, 240),
}
"""And the seconds that each may take."""


def main() -> None:
    args = _parse_arguments()
    if args.part:
        call, _ = PARTS[args.part]
        (args.work / f"{args.part}.json").write_text(json.dumps(call(args.work, args.size)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    figures: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    figures[args.size] = results = figures.get(args.size, {})
    if not (args.work / "model").exists():
        write_model(args.work / "model", args.size)
    if has_card():
        import torch

        figures["card"] = torch.cuda.get_device_name()
    for part in args.parts.split(","):
        passed = time.perf_counter() - began
        print(f"=== {passed:5.0f} s {part}", flush=True)
        results[part] = _run_part(part, args, min(PARTS[part][1], args.seconds - passed))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=1))
        print(json.dumps(results[part]), flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=tuple(SIZES), default="0.5B")
    parser.add_argument("--cpu", action="store_true", help="try the lines without a GPU")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-gpu"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_part(part: str, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """In a process of its own, which on a card is ended at its limit with all that it started."""
    options = ["--out", str(args.out), "--size", args.size, "--work", str(args.work), "--part", part]
    process = subprocess.Popen([sys.executable, __file__, *options])
    try:
        code = process.wait(limit_s if has_card() else None)
    except subprocess.TimeoutExpired:
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()
        process.wait(20)
        return {"failed": "too slow"}
    if code:
        return {"failed": code}
    result: dict[str, Any] = json.loads((args.work / f"{part}.json").read_text())
    return result


if __name__ == "__main__":
    main()
