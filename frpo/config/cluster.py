"""The Ray cluster of a run: the one that is joined, or one on this machine."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field

from frpo.config.section import PositiveFloat, Section


class ClusterConfig(Section):
    address: str | None = None
    """host:port of the Ray head (6379 unless it says otherwise), or auto for the cluster that `ray start`
    noted on this machine; null joins the job's (RAY_ADDRESS), or starts one here."""
    gpu: Literal["A100-40GB", "A100-80GB", "H100", "H200", "L40S"] | None = None
    """Card of the nodes, for what `frpo plan` predicts; null: that of this machine."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Placement of the actors' bundles over nodes."""
    object_store_gib: PositiveFloat | None = None
    """Object store of a cluster started here, GiB; null: half a GiB more than the policy's weights."""
    start_timeout_s: PositiveFloat = 1800.0
    """Longest wait for placement and for actors to start."""
    call_timeout_s: PositiveFloat = 1800.0
    """Longest wait for one call of an actor."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often an actor that dies is replaced within a run. The ranks of the learner count as one, and so do
    those of the fine-tunes; they go on from their last checkpoint."""


def find_cluster(address: str | None, option: str = "cluster.address") -> tuple[str, str] | None:
    """The cluster to join, and where it is named: `address`, given by `option`, or that of the job
    (RAY_ADDRESS). None where Ray is to be started on this machine."""
    if address:
        return address, option
    of_job = os.environ.get("RAY_ADDRESS")
    return (of_job, "RAY_ADDRESS") if of_job else None
