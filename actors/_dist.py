"""Rendezvous of training ranks, and the device they train on."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

TIMEOUT_S = 600.0
"""Longest wait for another rank in a collective; it then raises instead of hanging."""


def own_device() -> torch.device:
    """The GPU that Ray gave to this process, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def use_deterministic() -> None:
    """Same bits from the same input, for the rest of this process, before it computes anything on a GPU.

    An operation without such a kernel raises (docs.pytorch.org, `torch.use_deterministic_algorithms`).
    """
    os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", FLASH_ATTENTION_DETERMINISTIC="1")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def join_ranks(host: str, port: int, rank: int, world_size: int) -> None:
    """Make this process a rank of a DeepSpeed job without its launcher. Once per process."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",  # Ray shows each process its own device alone
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    os.environ["DS_ACCELERATOR"] = own_device().type
    if own_device().type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    import deepspeed
    import deepspeed.ops

    # else the CPU backend compiles, for a minute, an op that only inference uses; killed meanwhile it locks
    # all later ones
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if own_device().type == "cuda" else "gloo",
        verbose=False,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
