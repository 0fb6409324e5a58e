"""Frozen weights that leave the GPU while another role has it. They never change, so the copy in host memory is made once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Frozen:
    """Parameters and buffers on `device`, and their copy in host memory from the first time that they leave it."""

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        self.tensors, self.device = list(tensors), device
        self.host: list[torch.Tensor] = []

    def leave(self) -> None:
        """Their values are in host memory alone afterwards."""
        pinned = self.device.type == "cuda"
        self.host = self.host or [t.detach().cpu().pin_memory() if pinned else t.detach().cpu().clone() for t in self.tensors]
        for tensor, kept in zip(self.tensors, self.host, strict=True):
            tensor.data = kept
        if pinned:
            torch.cuda.empty_cache()

    def come(self) -> None:
        for tensor, kept in zip(self.tensors, self.host, strict=True):
            tensor.data = kept.to(self.device, non_blocking=True) if self.device.type == "cuda" else kept.clone()


def frozen(module: nn.Module, device: torch.device) -> Frozen:
    """All of a module that no optimiser changes: parameters without a gradient, and buffers."""
    return Frozen([*(p for p in module.parameters() if not p.requires_grad), *module.buffers()], device)
