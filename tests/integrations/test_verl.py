"""FRPO through verl's own dispatcher. Runs in verl's environment: make test-integrations."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

verl = pytest.importorskip("verl", reason="verl has an environment of its own: make test-integrations")

from frpo.objective import frpo_advantages, lam_of_radius  # noqa: E402

GROUPS = {"b": [0.0, 1.0, 0.25, 1.0], "a": [0.5, 0.5, 0.0, 1.0]}
TOKENS = 5


def batch(order: list[int], groups: dict[str, list[float]] = GROUPS) -> tuple[Any, np.ndarray[Any, Any], torch.Tensor]:
    """verl's batch: rewards on the last token, completions of uneven length in any order."""
    from verl import DataProto

    uid = np.array([g for g, rs in groups.items() for _ in rs], dtype=object)[order]
    scores = torch.tensor([r for rs in groups.values() for r in rs])[order]
    lengths = torch.arange(len(order)) % TOKENS + 1
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).float()
    rewards = torch.zeros(len(order), TOKENS)
    rewards[torch.arange(len(order)), lengths - 1] = scores
    data = DataProto.from_single_dict({"token_level_rewards": rewards, "response_mask": mask, "uid": uid})
    return data, uid, mask


def computed(data: Any, **settings: Any) -> torch.Tensor:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = OmegaConf.create({"adv_estimator": "frpo", "lam": 1.0, "frpo": settings})
    found = compute_advantage(data, adv_estimator=config.adv_estimator, lam=config.lam, config=config)
    assert torch.equal(found.batch["advantages"], found.batch["returns"])
    return torch.as_tensor(found.batch["advantages"])


def test_verl_registers_it_without_an_import() -> None:
    code = "import verl; from verl.trainer.ppo.core_algos import get_adv_estimator_fn as g; print(g('frpo').__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("frpo.integrations.verl"), done.stderr[-2000:]


@pytest.mark.parametrize("settings", [{"lam": 0.5}, {"lam": 2.0, "jackknife": False, "scale": "exact"}, {"rho": 0.3}])
def test_its_advantages_are_ours_whatever_the_order(settings: dict[str, Any]) -> None:
    order = list(np.random.default_rng(0).permutation(8))
    data, uid, mask = batch(order)
    found = computed(data, **settings)
    for name, rewards in GROUPS.items():
        group = torch.tensor([rewards], dtype=torch.float64)
        both = torch.tensor(list(GROUPS.values()), dtype=torch.float64)
        lam = settings.get("lam") or lam_of_radius(both, settings["rho"])
        jackknife, scale = settings.get("jackknife", True), settings.get("scale", "code")
        expected = frpo_advantages(group, lam, jackknife=jackknife, scale=scale)[0]
        rows = [i for i in range(8) if uid[i] == name]
        places = [order[i] % 4 for i in rows]
        assert found[rows].sum(1) / mask[rows].sum(1) == pytest.approx(expected[places].numpy(), abs=1e-6)
    assert torch.equal(found != 0, (found != 0) & (mask == 1))


def test_uneven_groups_and_a_single_completion() -> None:
    groups = {"x": [1.0, 0.0, 0.5], "alone": [1.0], "y": [0.0, 1.0]}
    data, uid, _ = batch(list(range(6)), groups)
    found = computed(data, lam=0.5)
    for name, rewards in groups.items():
        got = [float(found[i].max() if found[i].max() > 0 else found[i].min()) for i in range(6) if uid[i] == name]
        if name == "alone":
            assert got == [0.0]
        else:
            expected = frpo_advantages(torch.tensor([rewards], dtype=torch.float64), 0.5, jackknife=True, scale="code")[0]
            assert got == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "exactly one of lam and rho"), ({"lam": 1, "rho": 1}, "exactly one"), ({"lamda": 1}, "frpo.lamda: unknown setting"), ({"lam": 0}, "not above 0")],
)  # fmt: skip
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    data, *_ = batch(list(range(8)))
    with pytest.raises(ValueError, match=message):
        computed(data, **settings)
