"""Below top_p 1 the engines' log-probs are of the nucleus: no KL is made of them, and nothing is steered to
one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from frpo.config import ConfigError, RolloutConfig
from frpo.recipe import load_recipe

ROOT = Path(__file__).parents[2]
TESTBED = ROOT / "recipes" / "testbed.yaml"
RL = (
    "downstream=[{kind: rl, name: more, data: [{path: 'testbed:train', prompt: prompt, task: t}], objective: "
    "{beta: 0.1, target_kl: 0.4}, learner: {num_steps: 1}}]"
)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ("arms.grpo.objective.target_kl=0.5",),
            "arms.grpo.objective.target_kl: 0.5 is steered by a KL; what rollout.top_p = 0.9 draws",
        ),
        ((RL,), "downstream.more.objective.target_kl: 0.4 is steered by a KL"),
        (("attack={radii: [0.5], num_steps: 3}",), "attack.radii: 0.5 is a KL to steer to"),
    ],
)
def test_what_steers_to_a_kl_of_the_nucleus_is_refused(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(TESTBED, ("rollout.top_p=0.9", *sets))
    assert message in str(caught.value)
    assert "set it to 1" in str(caught.value)
    load_recipe(TESTBED, sets)


def test_penalties_draw_from_a_nucleus() -> None:
    load_recipe(TESTBED, ("rollout.top_p=0.9",))
    for name in ("paper_safety_qwen", "paper_safety_mistral"):
        assert load_recipe(ROOT / "recipes" / f"{name}.yaml", ()).rollout.top_p == 0.9


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_what_a_nucleus_adds_to_the_mismatch_is_allowed(top_p: float) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(50) * 0.3)
    order = np.argsort(-p)
    inside = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-12)) + 1]
    gap = -math.log(p[inside].sum())  # engine - learner, the same for every token of the nucleus
    limit = RolloutConfig(top_p=top_p, max_mismatch_kl=1e-9).mismatch_limit
    assert math.exp(-gap) - 1 + gap <= limit <= 0.2 + 1e-9
