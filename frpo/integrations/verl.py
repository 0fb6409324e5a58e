"""FRPO as an advantage estimator of verl (0.9): `algorithm.adv_estimator=frpo +algorithm.frpo.lam=0.5`.

verl loads this module by itself in every process once frpo is installed beside it (entry point verl.plugins);
where plugins are switched off, VERL_USE_EXTERNAL_MODULES=frpo.integrations.verl does. The radius mode is
`+algorithm.frpo.rho=0.3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from frpo.integrations.settings import FrpoSettings


@register_adv_est("frpo")  # type: ignore[untyped-decorator]
def frpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray[Any, Any],
    config: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl's interface: rewards and mask `[B, T]`, `index` `[B]` names the group of each; advantages and
    returns `[B, T]`.

    The reward of a completion is the sum over its tokens. Groups may have any size; one completion alone, or
    a reward that is not finite, gets 0. Raises ValueError for a setting that does not exist, or neither or
    both of lam and rho.
    """
    settings = FrpoSettings.of((config or {}).get("frpo"))
    with torch.no_grad():
        scores = token_level_rewards.sum(dim=-1).double()
        group: list[int] = np.unique(np.asarray(index), return_inverse=True)[1].tolist()
        column = [group[:i].count(g) for i, g in enumerate(group)]
        places = torch.tensor(group), torch.tensor(column)
        rewards = scores.new_full((max(group) + 1, max(2, max(column) + 1)), torch.nan)
        rewards[places] = scores
        advantages = settings.advantages(rewards)[places].to(token_level_rewards.dtype)
        advantages = advantages[:, None] * response_mask
    return advantages, advantages
