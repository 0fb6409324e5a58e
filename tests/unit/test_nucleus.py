"""Below top_p 1 the engines' log-probs are of the nucleus: what is made of a KL from them is refused, or not told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from frpo.batching import make_batch
from frpo.config import ConfigError, ObjectiveConfig, RolloutConfig
from frpo.recipe import load
from tests.unit.test_batching import group

ROOT = Path(__file__).parents[2]
TESTBED = ROOT / "recipes" / "testbed.yaml"
RL = "downstream=[{kind: rl, name: more, data: [{path: 'testbed:train', prompt: prompt, task: t}], objective: {beta: 0.1}, learner: {num_steps: 1}}]"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((), "arms.frpo-reverse.objective.penalty: reverse is made of a KL; rollout.top_p = 0.9, whose"),
        (
            ("arms.frpo-reverse.objective.penalty=k3", "arms.grpo.objective.target_kl=0.5"),
            "arms.grpo.objective.target_kl: 0.5 is steered by a KL",
        ),
        (("arms.frpo-reverse.objective.beta=0", RL), "downstream.more.objective.penalty: reverse is made of a KL"),
        (("arms.frpo-reverse.objective.beta=0", "attack={radii: [0.5], num_steps: 3}"), "attack.radii: 0.5 is a KL to steer to"),
    ],
)
def test_penalties_made_of_a_nucleus_are_refused(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(TESTBED, ("rollout.top_p=0.9", *sets))
    assert message in str(caught.value)
    assert "set it to 1" in str(caught.value)
    load(TESTBED, sets)


def test_k3_and_no_penalty_draw_from_a_nucleus() -> None:
    load(TESTBED, ("rollout.top_p=0.9", "arms.frpo-reverse.objective.penalty=k3"))
    load(TESTBED, ("rollout.top_p=0.9", "arms.frpo-reverse.objective.beta=0"))
    for name in ("paper_safety_qwen", "paper_safety_mistral"):
        assert load(ROOT / "recipes" / f"{name}.yaml", ()).rollout.top_p == 0.9


def test_no_kl_is_told_of_a_nucleus() -> None:
    scored, k3 = [group(0, [1.0, 0.0, 0.5], gap=0.1)], ObjectiveConfig(method="grpo", penalty="k3")
    assert make_batch(scored, k3)[1].kl == pytest.approx(0.2)
    batch, stats = make_batch(scored, k3, top_p=0.9)
    assert stats.kl is None
    assert batch.reference is not None  # k3's own log-probs are the learner's


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_what_a_nucleus_adds_to_the_mismatch_is_allowed(top_p: float) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(50) * 0.3)
    order = np.argsort(-p)
    inside = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-12)) + 1]
    gap = -math.log(p[inside].sum())  # engine - learner, the same for every token of the nucleus
    limit = RolloutConfig(top_p=top_p, max_mismatch_kl=1e-9).mismatch_limit
    assert math.exp(-gap) - 1 + gap <= limit <= 0.2 + 1e-9
