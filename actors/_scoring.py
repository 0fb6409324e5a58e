"""Log-probs of groups by transformers: what the reference scorer, the evaluation actors and the trained
policy share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from frpo.batching import flatten
from frpo.config import ModelConfig
from frpo.shape import BUDGET_TOKENS
from frpo.types import Floats, Group, Sequences


class FrozenPolicies:
    """Keeps the last `capacity` policies that were asked for."""

    def __init__(self, model: ModelConfig, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.loaded: dict[str, Any] = {}
        """Scorer and its weights' copy in host memory, by policy."""

    def _scorer(self, policy: str) -> Any:
        from actors._dist import device, use_deterministic
        from actors._host import frozen
        from frpo import hub, policies
        from frpo.logprobs import Scorer

        if policy in self.loaded:
            self.loaded[policy] = self.loaded.pop(policy)  # newest last
        else:
            while len(self.loaded) >= self.capacity:
                del self.loaded[next(iter(self.loaded))]
            if self.model.deterministic:
                use_deterministic()
            model = policies.load_beside(
                hub.on_this_node(policy), dtype=self.model.dtype, attention=self.model.attention
            )
            scorer = Scorer(model.to(device())).eval().requires_grad_(False)
            self.loaded[policy] = scorer, frozen(scorer, device())
        return self.loaded[policy][0]

    def offload(self) -> None:
        """Leave the GPU to another role."""
        for _, weights in self.loaded.values():
            weights.leave()

    def reload(self) -> None:
        for _, weights in self.loaded.values():
            weights.come()

    def logprobs(self, policy: str, block: Sequence[Group], temperature: float) -> list[tuple[Floats, ...]]:
        """Per group of a block, k arrays [T]: log-probs of its completions, nats."""
        from actors._dist import device
        from frpo.logprobs import completion_logprobs

        scorer = self._scorer(policy)
        flat = completion_logprobs(
            scorer, sequences_of(block), temperature=temperature, budget_tokens=BUDGET_TOKENS, device=device()
        )
        return by_group(flat, block)


def sequences_of(block: Sequence[Group]) -> Sequences:
    return flatten([(g.prompt.token_ids, c.token_ids) for g in block for c in g.completions])


def by_group(flat: Floats, block: Sequence[Group]) -> list[tuple[Floats, ...]]:
    """Values of all completion tokens of a block, `[sum of completion lengths]`, as k arrays [T] per
    group."""
    parts = iter(np.split(flat, np.cumsum([len(c.token_ids) for g in block for c in g.completions])[:-1]))
    return [tuple(next(parts) for _ in g.completions) for g in block]


def warm_up() -> None:
    """Do the long imports while other actors start."""
    import transformers  # noqa: F401

    import frpo.logprobs
    import frpo.policies  # noqa: F401
