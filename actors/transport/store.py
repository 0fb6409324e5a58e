"""Weights through Ray's object store: rank 0 puts them once, every engine reads them from its own node's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch
from numpy.typing import NDArray
from ray import ObjectRef
from torch import Tensor

if TYPE_CHECKING:
    from frpo.actors._engine import Engine
    from frpo.actors._sampler import Sampler

BUCKET_BYTES = 64 << 20
READ_TIMEOUT_S = 300

Bucket = list[tuple[str, str, NDArray[Any]]]
"""Name, dtype and values of some tensors."""


@dataclass(frozen=True)
class StoredTensors:
    """Tensors in the object store."""

    refs: tuple[ObjectRef[Bucket], ...]
    """To at most about BUCKET_BYTES each."""
    num_bytes: int

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """One bucket at a time (zero-copy, read-only)."""
        for ref in self.refs:
            for name, dtype, array in ray.get(ref, timeout=READ_TIMEOUT_S):
                yield name, torch.from_numpy(array).view(getattr(torch, dtype))

    def deliver(self, sampler: Sampler) -> None:
        """All weights of a model."""
        sampler.load(self.read())


def put_tensors(named: Iterable[tuple[str, Tensor]]) -> StoredTensors:
    """Put tensors into the object store. numpy has no bfloat16: its bits travel as int16."""
    refs: list[ObjectRef[Bucket]] = []
    bucket: Bucket = []
    size = 0
    total = 0
    for name, tensor in named:
        plain = tensor.detach().cpu().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        array = (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
        bucket.append((name, dtype, array))
        size += array.nbytes
        total += array.nbytes
        if size >= BUCKET_BYTES:
            refs.append(ray.put(bucket))
            bucket = []
            size = 0
    if bucket:
        refs.append(ray.put(bucket))
    return StoredTensors(tuple(refs), total)


class StoreTransport:
    def pack(self, engine: Engine) -> StoredTensors | None:
        named = engine.named_weights()
        if engine.rank == 0:
            return put_tensors(named)
        for _ in named:
            pass
        return None
