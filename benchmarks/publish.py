"""What it takes to bring a version of the policy to the engines, by each transport: bytes, and seconds from
the learner to the engine.

    python benchmarks/publish.py recipes/smollm2_math.yaml --out publish.json

One engine and one learner rank of the recipe, which trains an adapter, on real weights; each transport in a
cluster of its own. The least of several publishes, the first left out: it sets the transport up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from frpo.cluster import place_actors, publisher_of
from frpo.config import Config
from frpo.metrics import RunLog
from frpo.planning import plan_run
from frpo.recipe import load_recipe

TRANSPORTS = {
    "adapter": ("rollout.lora=adapter",),
    "object_store": ("rollout.lora=merged",),
    "process_group": ("rollout.lora=merged", "rollout.transport=process_group"),
}


def measure_transport(config: Config, times: int) -> dict[str, Any]:
    """Of one transport."""
    with (
        RunLog(config.folder, config) as log,
        place_actors(config, plan_run(config).only("rollout", "learner"), log) as spawner,
    ):
        rollouts = spawner.rollouts()
        learner = spawner.learner()
        for pool in (rollouts, learner):
            pool.actors.wait_until_ready(config.cluster.start_timeout_s)
        learner.join()
        arm = config.arms[0]
        learner.start(Path(config.model.path), config.model, arm.learner, arm.objective, config.rollout, 0)
        way = publisher_of(config, "learner", learner, rollouts)
        sent = 0
        seconds = []
        for version in range(times + 1):
            began = time.perf_counter()
            sent = way.publish(version)
            seconds.append(time.perf_counter() - began)
    return {"bytes": sent, "seconds": min(seconds[1:]), "all_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="FIELD=VALUE")
    asked = parser.parse_args()
    figures = {}
    for name, sets in TRANSPORTS.items():
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure_transport(
                load_recipe(Path(asked.recipe), (*asked.sets, *sets, f"run_dir={folder}")), asked.times
            )
        print(json.dumps({name: figures[name]}), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
