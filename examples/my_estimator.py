"""An estimator of your own, beside GRPO and FRPO on the same rewards: python examples/my_estimator.py

An estimator is a value with one method, from the rewards of groups to advantages. docs/extending.md shows how
a recipe can name it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frpo.objective import Estimator, Frpo, Groups, Grpo


@dataclass(frozen=True)
class LogMean:
    """A_j = (r_j - mean) / mean of the group: the gradient of the logarithm of the mean reward, in which
    prompts that rarely succeed count more. Rewards of at least 0; no unit."""

    def advantages(self, groups: Groups) -> Tensor:
        return groups.only_pairs((groups.values - groups.mean) / groups.mean.clamp(min=1e-6))


ESTIMATORS: dict[str, Estimator] = {"GRPO": Grpo(), "FRPO, λ 0.5": Frpo(lam=0.5), "log mean": LogMean()}


def compare_estimators(rewards: list[list[float]]) -> dict[str, Tensor]:
    """Advantages `[groups, k]` of each estimator."""
    groups = Groups.of(torch.tensor(rewards))
    return {name: estimator.advantages(groups) for name, estimator in ESTIMATORS.items()}


if __name__ == "__main__":
    rows = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    for name, advantages in compare_estimators(rows).items():
        print(f"{name:12}", *(f"{row.tolist()}" for row in advantages.round(decimals=2)))
