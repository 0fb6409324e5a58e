"""FRPO inside TRL's GRPOTrainer (1.16): the same trainer with other advantages.

trainer = FRPOTrainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=data,
frpo=FrpoSettings(lam=0.5))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from frpo.integrations.settings import FrpoSettings

__all__ = ["FRPOTrainer", "FrpoSettings"]


class FRPOTrainer(GRPOTrainer):
    """`frpo` says how; everything else is GRPOTrainer's. `scale_rewards` has no meaning here.

    A completion for which all reward functions gave None gets advantage 0 and does not count in its group.
    Groups are whole whatever the number of processes: TRL gathers the rewards of all of them first.
    """

    def __init__(self, *args: Any, frpo: FrpoSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation: {self.multi_objective_aggregation}; FRPO needs "
                "sum_then_normalize"
            )
        self.frpo = frpo

    def _calculate_rewards(self, *args: Any) -> Tensor:
        # [completions of all processes, reward functions]
        self._rewards: Tensor = super()._calculate_rewards(*args)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        k = self.num_generations if self.model.training else self.num_generations_eval
        if k < 2:  # an evaluation may draw one completion a prompt: no group, no advantage
            return scored
        weighted = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(dim=1)
        rewards = weighted.masked_fill(self._rewards.isnan().all(dim=1), torch.nan)
        advantages = self.frpo.advantages(rewards.view(-1, k)).view(-1)
        begin = self.accelerator.process_index * len(inputs)
        mine = advantages[begin : begin + len(inputs)]
        scored["advantages"] = mine.to(scored["advantages"].dtype)
        for _ in range(min(len(advantages), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages.tolist())
        return scored
