"""Weights by a broadcast over a process group of its own (gloo on the CPU, NCCL on GPUs): rank 0 of whoever
trains, and every engine.

The group is standalone: it never touches the default group, which DeepSpeed and vLLM own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from frpo.actors._engine import Engine
    from frpo.actors._sampler import Sampler

BUCKET_BYTES = 64 << 20
GROUP_TIMEOUT_S = 300

Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class WeightsMeta:
    """Names, dtypes and shapes of the tensors that a broadcast sends, in the order in which it sends them."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def num_bytes(self) -> int:
        total = 0
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            total += torch.Size(shape).numel() * int(getattr(torch, dtype).itemsize)
        return total


@dataclass(frozen=True)
class Announced:
    """A broadcast that rank 0 is about to make, or is making."""

    group: str
    """By the name under which the engines joined it."""
    meta: WeightsMeta

    @property
    def num_bytes(self) -> int:
        return self.meta.num_bytes

    def deliver(self, sampler: Sampler) -> None:
        sampler.receive(self.group, self.meta)


class GroupTransport:
    """Rank 0 holds its end of the group; the others only take part in the gathering."""

    def __init__(self) -> None:
        self.group: Any = None
        self.meta: WeightsMeta | None = None

    def open(self, host: str, port: int, world_size: int, backend: str) -> None:
        self.group = make_group(host, port, 0, world_size, backend)

    def announce(self, engine: Engine, name: str) -> Announced:
        """All ranks."""
        self.meta = meta_of(engine.named_weights())
        return Announced(name, self.meta)

    def pack(self, engine: Engine) -> None:
        """All ranks: send. The parcel is what was announced."""
        named = engine.named_weights()
        if engine.rank == 0:
            assert self.meta is not None, "announce() comes before the first broadcast"
            try:
                broadcast(named, self.meta, self.group)
            except RuntimeError:
                self.group = None  # others wait for what will not come until it is closed
                raise
        else:
            for _ in named:
                pass


def free_address() -> tuple[str, int]:
    """An address of this node and a port that was free a moment ago."""
    host = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host, int(probe.getsockname()[1])


def make_group(host: str, port: int, rank: int, world_size: int, backend: str) -> Any:
    """A process group of its own; rank 0 hosts the store. Raises after GROUP_TIMEOUT_S if someone is
    missing."""
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
    names, dtypes, shapes = [], [], []
    for name, tensor in named:
        names.append(name)
        dtypes.append(str(tensor.dtype).removeprefix("torch."))
        shapes.append(tuple(tensor.shape))
    return WeightsMeta(tuple(names), tuple(dtypes), tuple(shapes))


def _cut_into_buckets(meta: WeightsMeta) -> Iterator[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    """Cut the tensors into runs of one dtype and at most BUCKET_BYTES; both sides cut alike."""
    bucket: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    size = 0
    for name, dtype_name, shape in zip(meta.names, meta.dtypes, meta.shapes, strict=True):
        dtype: torch.dtype = getattr(torch, dtype_name)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if bucket and (size + nbytes > BUCKET_BYTES or dtype != bucket[0][1]):
            yield bucket
            bucket = []
            size = 0
        bucket.append((name, dtype, shape))
        size += nbytes
    if bucket:
        yield bucket


def broadcast(named: Named, meta: WeightsMeta, group: Any) -> None:
    """Rank 0: send the tensors of `meta`, in its order."""
    source = iter(named)
    for bucket in _cut_into_buckets(meta):
        parts = []
        for name, dtype, shape in bucket:
            own_name, tensor = next(source)
            assert (own_name, tensor.dtype, tuple(tensor.shape)) == (name, dtype, shape), (
                f"{own_name} where {name} was announced"
            )
            parts.append(tensor.detach().reshape(-1))
        group.broadcast(torch.cat(parts), 0).wait()


def receive_all(meta: WeightsMeta, group: Any, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Other ranks: yield what rank 0 sends."""
    for bucket in _cut_into_buckets(meta):
        sizes = [torch.Size(shape).numel() for _, _, shape in bucket]
        flat = torch.empty(sum(sizes), dtype=bucket[0][1], device=device)
        group.broadcast(flat, 0).wait()
        for (name, _, shape), part in zip(bucket, flat.split(sizes), strict=True):
            yield name, part.view(shape)
