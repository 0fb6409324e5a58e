"""What leaves the GPU while another role has it: to pinned host memory, which is taken once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Host:
    """Host memory for some tensors of `device`, and the way there and back. Those that never change are
    copied there once."""

    def __init__(self, device: torch.device, *, frozen: bool) -> None:
        self.device, self.frozen = device, frozen
        self.tensors: list[torch.Tensor] = []
        self.host: list[torch.Tensor] = []

    def take(self, tensors: Iterable[torch.Tensor]) -> None:
        """Their values are in host memory alone afterwards."""
        self.tensors = list(tensors)
        pinned = self.device.type == "cuda"
        if [t.shape for t in self.tensors] != [h.shape for h in self.host]:
            self.host = [
                torch.empty_like(t, device="cpu", pin_memory=pinned, requires_grad=False)
                for t in self.tensors
            ]
        elif self.frozen:
            self._point(self.host)
            return
        for tensor, kept in zip(self.tensors, self.host, strict=True):
            kept.copy_(tensor.detach())
        self._point(self.host)

    def give(self) -> None:
        """Back to the device."""
        self._point(
            [
                kept.to(self.device, non_blocking=True) if self.device.type == "cuda" else kept.clone()
                for kept in self.host
            ]
        )

    def _point(self, where: list[torch.Tensor]) -> None:
        for tensor, values in zip(self.tensors, where, strict=True):
            tensor.data = values
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Frozen:
    """Parameters and buffers that no optimiser changes."""

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        self.tensors, self.kept = list(tensors), Host(device, frozen=True)

    def leave(self) -> None:
        self.kept.take(self.tensors)

    def come(self) -> None:
        self.kept.give()


def frozen(module: nn.Module, device: torch.device) -> Frozen:
    """All of a module that no optimiser changes: parameters without a gradient, and buffers."""
    return Frozen([*(p for p in module.parameters() if not p.requires_grad), *module.buffers()], device)
