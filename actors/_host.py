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
        known = [kept.shape for kept in self.host] == [tensor.shape for tensor in self.tensors]
        if not known:
            self.host = [self._room_for(tensor) for tensor in self.tensors]
        if not (known and self.frozen):
            for tensor, kept in zip(self.tensors, self.host, strict=True):
                kept.copy_(tensor.detach())
        self._point(self.host)

    def _room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)

    def give(self) -> None:
        """Back to the device."""
        if self.device.type == "cuda":
            self._point([kept.to(self.device, non_blocking=True) for kept in self.host])
        else:
            self._point([kept.clone() for kept in self.host])

    def _point(self, where: list[torch.Tensor]) -> None:
        for tensor, values in zip(self.tensors, where, strict=True):
            tensor.data = values
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def frozen_tensors(module: nn.Module) -> list[torch.Tensor]:
    """All of a module that no optimiser changes: parameters without a gradient, and buffers."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    return [*frozen, *module.buffers()]
