"""A LoRA adapter alone: vLLM applies it unmerged, on the weights that it was trained on.

Merged weights lie on the grid of their dtype. In bfloat16 whatever is smaller than half a step of the base's
weight is lost, most of an early update, and engines would draw from another policy than the learner trains.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frpo import saved
from frpo.actors.transport.store import StoredTensors, StoreTransport, put_tensors

if TYPE_CHECKING:
    from frpo.actors._engine import Engine
    from frpo.actors._sampler import Sampler

MEMORY = Path("/dev/shm")
"""A folder in memory, on Linux."""


@dataclass(frozen=True)
class SentAdapter:
    base: str
    """The saved policy that it stands on, by a path or hub name that every node knows."""
    config: str
    """adapter_config.json"""
    tensors: StoredTensors
    """adapter_model.safetensors"""

    @property
    def num_bytes(self) -> int:
        return self.tensors.num_bytes

    def deliver(self, sampler: Sampler) -> None:
        """vLLM reads adapters from folders alone (`LoRARequest` in vllm/lora/request.py)."""
        from safetensors.torch import save_file

        folder = Path(tempfile.mkdtemp(prefix="frpo-adapter-", dir=MEMORY if MEMORY.is_dir() else None))
        try:
            (folder / saved.ADAPTER).write_text(self.config)
            weights = {name: tensor.clone() for name, tensor in self.tensors.read()}
            save_file(weights, folder / saved.WEIGHTS)
            sampler.serve(folder, Path(self.base))
        finally:
            shutil.rmtree(folder)


class AdapterTransport:
    def pack(self, engine: Engine) -> SentAdapter | StoredTensors | None:
        """All weights of a fine-tune that trains them."""
        if not engine.lora:
            return StoreTransport().pack(engine)
        adapter = engine.adapter()
        if adapter is None:
            return None
        return SentAdapter(str(engine.stands_on), adapter.config, put_tensors(adapter.weights.items()))
