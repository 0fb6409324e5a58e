"""Several nodes: raylets on this machine, as ray.cluster_utils makes them. Where roles stand, and a node that
dies."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frpo.disk import sha256_of_folder
from frpo.metrics import RunLog, read_steps
from frpo.planning import plan_run
from tests.support import runs
from tests.support.models import config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROLES = 5
SETTINGS = (
    *runs.SHORT,
    *runs.ONE_ARM,
    "rollout.num_workers=2",
    "learner.num_steps=40",
    "checkpoint.every=10",
    "evaluate.validate_every=100",
)


@pytest.fixture
def nodes(ray_cluster: None) -> Iterator[Any]:
    """An empty cluster beside the shared one, which is left for as long."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    made = Cluster()
    yield made
    ray.shutdown()
    made.shutdown()
    runs.start_ray()


def add(nodes: Any, cpus: float) -> Any:
    return nodes.add_node(num_cpus=cpus, object_store_memory=200 << 20, include_dashboard=False)


@pytest.mark.parametrize(
    ("strategy", "spread"), [("PACK", [ROLES]), ("STRICT_PACK", [ROLES]), ("STRICT_SPREAD", [1] * ROLES)]
)
def test_roles_stand_together_or_apart_as_asked(
    nodes: Any, tmp_path: Path, strategy: str, spread: list[int]
) -> None:
    from ray.util import placement_group_table

    from frpo import cluster

    for _ in range(ROLES):
        add(nodes, 2)
    asked = config(f"cluster.strategy={strategy}", f"cluster.address={nodes.address}", f"run_dir={tmp_path}")
    assert len(plan_run(asked).bundles) == ROLES
    with RunLog(tmp_path, asked) as log, cluster.place_actors(asked, plan_run(asked), log) as spawner:
        where = placement_group_table(spawner.group)["bundles_to_node_id"]
    assert sorted(Counter(where.values()).values()) == spread


def test_a_plan_that_no_node_can_hold_is_refused(nodes: Any, tmp_path: Path) -> None:
    from frpo import cluster
    from frpo.config import ConfigError
    from frpo.roles import WorkerFailed

    add(nodes, 1)
    add(nodes, 1)
    apart = config(
        "cluster.strategy=STRICT_SPREAD",
        "cluster.start_timeout_s=5",
        f"cluster.address={nodes.address}",
        f"run_dir={tmp_path}",
    )
    with (
        RunLog(tmp_path, apart) as log,
        pytest.raises(WorkerFailed, match="No placement for 5 bundles"),
        cluster.place_actors(apart, plan_run(apart), log),
    ):
        pass
    large = config("rollout.num_cpus=4", f"cluster.address={nodes.address}", f"run_dir={tmp_path}")
    with (
        RunLog(tmp_path, large) as log,
        pytest.raises(ConfigError, match=r"needs 4\.75 CPUs and the cluster has 2"),
        cluster.place_actors(large, plan_run(large), log),
    ):
        pass


def start(folder: Path, nodes: Any) -> subprocess.Popen[str]:
    command = runs.command(folder, *SETTINGS, "cluster.strategy=SPREAD", f"cluster.address={nodes.address}")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    log = folder.with_suffix(".out").open("w")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=runs.ROOT, env=env)


def places() -> dict[str, list[str]]:
    """Node ids of each class of actor that lives."""
    from ray._private.state import actors

    found: dict[str, list[str]] = {}
    for actor in actors().values():
        if actor["State"] == "ALIVE":
            found.setdefault(actor["ActorClassName"], []).append(actor["Address"]["NodeID"])
    return found


def test_a_node_that_dies_takes_its_workers_along_and_the_run_goes_on(nodes: Any, tmp_path: Path) -> None:
    """Its actors come back on the other nodes, and the weights are those of the undisturbed run."""
    import ray

    made = {n.node_id: n for n in (add(nodes, 1) for _ in range(3))}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert start(whole, nodes).wait(500) == 0, whole.with_suffix(".out").read_text()[-3000:]
    process = start(torn, nodes)
    runs.wait_for(lambda: len(read_steps(torn, "rlhf/frpo")) >= 8, process)
    ray.init(address=nodes.address, log_to_driver=False)
    stand = places()
    head = next(n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"])
    kept = {head, *stand["LearnerWorker"]}
    victim = next(n for n in stand["RolloutWorker"] if n not in kept)
    nodes.remove_node(made[victim], allow_graceful=False)
    assert len(read_steps(torn, "rlhf/frpo")) < 40, "killed too late to count"
    assert process.wait(500) == 0, torn.with_suffix(".out").read_text()[-3000:]
    assert [r.step for r in read_steps(torn, "rlhf/frpo")] == list(range(1, 41))
    assert sha256_of_folder(torn / "rlhf" / "frpo" / "policy") == sha256_of_folder(
        whole / "rlhf" / "frpo" / "policy"
    )
