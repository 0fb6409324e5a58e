"""Two ways to a flatter policy: the average of its weights over training, and updates that look uphill
first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the weights after each update, float32: the one of t updates ago counts
    decay^t, and all shares add up to 1 from the first on."""

    def __init__(self, trained: Sequence[nn.Parameter], decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.values = [weight.detach().float().clone() for weight in trained]
        self.count = 0

    @torch.no_grad()
    def add(self) -> None:
        """After an update."""
        self.count += 1
        share = (1 - self.decay) / (1 - self.decay**self.count)
        for value, weight in zip(self.values, self.trained, strict=True):
            value.lerp_(weight.float(), share)

    @torch.no_grad()
    def replace(self) -> None:
        """Put the average in the place of the weights."""
        for value, weight in zip(self.values, self.trained, strict=True):
            weight.copy_(value)

    def state(self) -> dict[str, int | list[Tensor]]:
        return {"count": self.count, "values": self.values}

    def restore(self, count: int, values: Iterable[Tensor]) -> None:
        self.count = count
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)


class Gradient:
    """Of a loss that is summed over passes and ranks, outside of DeepSpeed, which would take it for the one
    to step by."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self.trained = trained
        self.values = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained]

    def add(self, loss: Tensor) -> None:
        parts = torch.autograd.grad(loss, self.trained, allow_unused=True)
        for value, part in zip(self.values, parts, strict=True):
            if part is not None:
                value += part

    def reduce(self) -> None:
        """Sum over ranks; all call it."""
        for value in self.values:
            dist.all_reduce(value)

    def norm(self) -> float:
        """L2 over all weights."""
        return math.sqrt(sum(float(value.double().square().sum()) for value in self.values))


@contextmanager
def climbed(gradient: Gradient, radius: float) -> Iterator[None]:
    """The weights `radius` (L2) up the gradient meanwhile, and to the bit what they were afterwards:
    sharpness-aware minimisation (arXiv 2010.01412, equation 2)."""
    norm = gradient.norm()
    if not 0 < norm < math.inf:  # nowhere to climb; the update itself will say what is broken
        yield
        return
    before = [weight.detach().clone() for weight in gradient.trained]
    with torch.no_grad():
        for weight, value in zip(gradient.trained, gradient.values, strict=True):
            weight.add_(value, alpha=radius / norm)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(gradient.trained, before, strict=True):
                weight.copy_(own)
