"""Raylets of this machine that stand for the machines of a cluster, so that one can die and another come."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from frpo.config import Config, ConfigError, find_cluster
from frpo.joining import ALONE, find_temporary_folder

NODES = 3
"""Beside the head's. When one dies the others hold the whole plan."""


class Raylets:
    """A head with no CPUs, for the driver, and NODES nodes that share the actors."""

    def __init__(self, cluster: Any, options: dict[str, Any]) -> None:
        self._cluster, self._options = cluster, options
        self._nodes = [self._add() for _ in range(NODES)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def replace_one(self, chance: Random) -> None:
        """Kill one at random, with all that stands on it, as a machine that is lost; then another joins."""
        victim = self._nodes.pop(chance.randrange(len(self._nodes)))
        self._cluster.remove_node(victim, allow_graceful=False)
        self._nodes.append(self._add())

    def _add(self) -> Any:
        return self._cluster.add_node(**self._options)


@contextmanager
def share_raylets(config: Config, num_cpus: float, object_store: int) -> Iterator[Raylets]:
    """Start them for plans of so many CPUs, with so many bytes of object store each. Raises ConfigError where
    the recipe names a cluster, whose machines are not ours to kill."""
    joined = find_cluster(config.cluster.address)
    if joined:
        raise ConfigError(f"{joined[1]}: {joined[0]}: nodes are killed in a cluster of chaos's own; unset it")
    os.environ[ALONE] = "0"
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    ray_constants.ENABLE_RAY_CLUSTER = False
    common = {
        "temp_dir": str(find_temporary_folder()),
        "include_dashboard": False,
        "object_store_memory": object_store,
    }
    made = Cluster(initialize_head=True, head_node_args={**common, "num_cpus": 0})
    try:
        yield Raylets(made, {**common, "num_cpus": math.ceil(num_cpus / (NODES - 1))})
    finally:
        made.shutdown()
