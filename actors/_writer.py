"""Writes DeepSpeed's checkpoints beside the training: from a copy in host memory, in a thread, each file
hashed as it is written."""

from __future__ import annotations

import copy
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from torch import Tensor

from frpo.types import Written


class Writer(TorchCheckpointEngine):  # type: ignore[misc]
    """What a rank writes of one checkpoint, one after the other. `save` returns as soon as the values are
    copied."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.files: list[Future[Written]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """A new checkpoint begins; the last must have been asked for."""
        self.files = []

    def preserves_storage_sharing(self) -> bool:
        """That views need no copy of their own before `save`: it makes one."""
        return False

    def save(self, state_dict: Any, path: str) -> None:
        copied = on_host(state_dict)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.files.append(self.thread.submit(write_hashed, copied, Path(path)))

    def written(self) -> list[Written] | None:
        """The files of this rank, on disk; None while it still writes. Raises OSError, as a full disk
        does."""
        if not all(file.done() for file in self.files):
            return None
        return [file.result() for file in self.files]

    def close(self) -> None:
        """Waits for what is being written."""
        self.thread.shutdown()


def on_host(state: Any, seen: dict[Any, Tensor] | None = None) -> Any:
    """The same containers with copies of the tensors in host memory, pinned if they come from a GPU. Whoever
    shares memory wholly goes on to."""
    seen = {} if seen is None else seen
    if isinstance(state, Tensor):
        own = (state.data_ptr(), state.dtype, state.shape, state.stride(), state.device)
        if own not in seen or not state.numel():
            seen[own] = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda, requires_grad=False)
            seen[own].copy_(state.detach(), non_blocking=True)
        return seen[own]
    if isinstance(state, dict):
        copied = copy.copy(state)
        for key, value in state.items():
            copied[key] = on_host(value, seen)
        return copied
    if isinstance(state, list):
        return [on_host(value, seen) for value in state]
    if type(state) is tuple:
        return tuple(on_host(value, seen) for value in state)
    return state


def write_hashed(state: Any, path: Path) -> Written:
    """Raises OSError."""
    with path.open("wb") as file:
        hashing: Any = Hashing(file)
        try:
            torch.save(state, hashing)
        except RuntimeError:
            if hashing.failure:
                raise hashing.failure from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return Written(str(path), hashing.size, hashing.digest.hexdigest())


class Hashing:
    """A file that is only written to."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None
        """Why it could not be written: torch ends in an error of its own, which tells of a position."""

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self.file.flush()
