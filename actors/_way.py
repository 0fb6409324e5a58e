"""Weights on the straight way from where a training began to where it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frpo.actors import _adapters

if TYPE_CHECKING:
    from frpo.actors._engine import Engine


class Way:
    """Of some weights that are trained after this is made; both of its ends are kept in host memory."""

    def __init__(self, trained: Sequence[Tensor]) -> None:
        self.trained = trained
        self.start = _copies_of(trained)
        self.end: list[Tensor] = []

    @torch.no_grad()
    def go(self, share: float) -> None:
        """Put the weights at start + share (end - start), computed in float32; the end is where they are when
        this is first called."""
        self.end = self.end or _copies_of(self.trained)
        for weight, start, end in zip(self.trained, self.start, self.end, strict=True):
            weight.copy_(torch.lerp(start.float(), end.float(), share))


def _copies_of(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().cpu().clone() for weight in weights]


def way_from(engine: Engine) -> Way:
    """From the weights that the engine has now, before its first update.

    Of adapters B alone goes the way, A stays: with B A = 0 at the start, W + (share B) A lies at that share
    of the way from W to W + B A.
    """
    if engine.lora:
        return Way(_adapters.second_matrices(engine.ds.module))
    return Way(engine.trained)
