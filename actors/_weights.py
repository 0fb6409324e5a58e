"""How weights travel from a learner to the rollout engines: through Ray's object store, or a process group of their own.

The learner's side needs torch and ray alone; the engine's side is called from the rollout worker. The process group is
standalone (gloo on the CPU, NCCL on GPUs): it never touches the default group, which DeepSpeed and vLLM own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from frpo.types import WeightsMeta

BUCKET_BYTES = 64 << 20
GROUP_TIMEOUT_S = 300

Named = Iterable[tuple[str, Tensor]]


# ---- object store


def put_tensors(named: Named) -> list[Any]:
    """Put tensors into the object store in buckets; a list of ObjectRefs to lists of (name, dtype, array).

    numpy has no bfloat16: its bits travel as int16.
    """
    refs, bucket, size = [], [], 0
    for name, tensor in named:
        plain = tensor.detach().cpu().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        array = (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
        bucket.append((name, dtype, array))
        size += array.nbytes
        if size >= BUCKET_BYTES:
            refs.append(ray.put(bucket))
            bucket, size = [], 0
    return refs + ([ray.put(bucket)] if bucket else [])


def tensors_of(refs: list[Any], timeout_s: float = GROUP_TIMEOUT_S) -> Iterator[tuple[str, Tensor]]:
    """Read what `put_tensors` wrote, one bucket at a time (zero-copy, read-only)."""
    for ref in refs:
        for name, dtype, array in ray.get(ref, timeout=timeout_s):
            yield name, torch.from_numpy(array).view(getattr(torch, dtype))


# ---- process group


def free_address() -> tuple[str, int]:
    """An address of this node and a port that was free a moment ago."""
    host = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host, int(probe.getsockname()[1])


def make_group(host: str, port: int, rank: int, world_size: int, backend: str) -> Any:
    """A process group of its own; rank 0 hosts the store. Raises after GROUP_TIMEOUT_S if someone is missing."""
    limit = timedelta(seconds=GROUP_TIMEOUT_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, world_size, is_master=rank == 0, timeout=limit, wait_for_workers=False
    )
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, world_size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def meta_of(named: Named) -> WeightsMeta:
    rows = [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in named]
    return WeightsMeta(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows))


def _buckets(meta: WeightsMeta) -> Iterator[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    """Cut the tensors into runs of one dtype and at most BUCKET_BYTES; both sides cut alike."""
    bucket: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    size = 0
    for name, dtype_name, shape in zip(meta.names, meta.dtypes, meta.shapes, strict=True):
        dtype: torch.dtype = getattr(torch, dtype_name)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if bucket and (size + nbytes > BUCKET_BYTES or dtype != bucket[0][1]):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, dtype, shape))
        size += nbytes
    if bucket:
        yield bucket


def broadcast(named: Named, meta: WeightsMeta, group: Any) -> None:
    """Rank 0: send the tensors of `meta`, in its order."""
    source = iter(named)
    for bucket in _buckets(meta):
        parts = []
        for name, dtype, shape in bucket:
            found, tensor = next(source)
            assert (found, tensor.dtype, tuple(tensor.shape)) == (name, dtype, shape), f"{found} where {name} was announced"
            parts.append(tensor.detach().reshape(-1))
        group.broadcast(torch.cat(parts), 0).wait()


def receive(meta: WeightsMeta, group: Any, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Other ranks: yield what rank 0 sends."""
    for bucket in _buckets(meta):
        sizes = [torch.Size(shape).numel() for _, _, shape in bucket]
        flat = torch.empty(sum(sizes), dtype=bucket[0][1], device=device)
        group.broadcast(flat, 0).wait()
        for (name, _, shape), part in zip(bucket, flat.split(sizes), strict=True):
            yield name, part.view(shape)
