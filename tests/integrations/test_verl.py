"""FRPO through verl's own dispatcher. Runs in verl's environment: make test-integrations."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

verl = pytest.importorskip("verl", reason="verl has an environment of its own: make test-integrations")

from frpo.objective import Frpo, Groups, lam_of_radius  # noqa: E402

GROUPS = {"b": [0.0, 1.0, 0.25, 1.0], "a": [0.5, 0.5, 0.0, 1.0]}
TOKENS = 5


def batch(
    order: list[int], groups: dict[str, list[float]] = GROUPS
) -> tuple[Any, np.ndarray[Any, Any], torch.Tensor]:
    """verl's batch: rewards on the last token, completions of uneven length in any order."""
    from verl import DataProto

    uid = np.array(
        list(chain.from_iterable([name] * len(rewards) for name, rewards in groups.items())), dtype=object
    )[order]
    scores = torch.tensor(list(chain.from_iterable(groups.values())))[order]
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
    batch = compute_advantage(data, adv_estimator=config.adv_estimator, lam=config.lam, config=config)
    assert torch.equal(batch.batch["advantages"], batch.batch["returns"])
    return torch.as_tensor(batch.batch["advantages"])


def test_verl_registers_it_without_an_import() -> None:
    code = (
        "import verl; from verl.trainer.ppo.core_algos import get_adv_estimator_fn as g; "
        "print(g('frpo').__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("frpo.integrations.verl"), done.stderr[-2000:]


@pytest.mark.parametrize(
    "settings", [{"lam": 0.5}, {"lam": 2.0, "jackknife": False, "scale": "exact"}, {"rho": 0.3}]
)
def test_its_advantages_are_ours_whatever_the_order(settings: dict[str, Any]) -> None:
    order = list(np.random.default_rng(0).permutation(8))
    data, uid, mask = batch(order)
    advantages = computed(data, **settings)
    for name, rewards in GROUPS.items():
        group = torch.tensor([rewards], dtype=torch.float64)
        both = torch.tensor(list(GROUPS.values()), dtype=torch.float64)
        lam = settings.get("lam") or lam_of_radius(Groups.of(both), settings["rho"])
        jackknife, scale = settings.get("jackknife", True), settings.get("scale", "code")
        expected = Frpo(lam, jackknife, scale).advantages(Groups.of(group))[0]
        rows = [i for i in range(8) if uid[i] == name]
        places = [order[i] % 4 for i in rows]
        assert advantages[rows].sum(1) / mask[rows].sum(1) == pytest.approx(
            expected[places].numpy(), abs=1e-6
        )
    assert torch.equal(advantages != 0, (advantages != 0) & (mask == 1))


def test_uneven_groups_and_a_single_completion() -> None:
    groups = {"x": [1.0, 0.0, 0.5], "alone": [1.0], "y": [0.0, 1.0]}
    data, uid, _ = batch(list(range(6)), groups)
    advantages = computed(data, lam=0.5)
    for name, rewards in groups.items():
        got = [
            float(advantages[i].max() if advantages[i].max() > 0 else advantages[i].min())
            for i in range(6)
            if uid[i] == name
        ]
        if name == "alone":
            assert got == [0.0]
        else:
            group = torch.tensor([rewards], dtype=torch.float64)
            expected = Frpo(0.5).advantages(Groups.of(group))[0]
            assert got == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "exactly one of lam and rho"), ({"lam": 1, "rho": 1}, "exactly one"),
     ({"lamda": 1}, "frpo.lamda: unknown setting"), ({"lam": 0}, "not above 0")],
)  # fmt: skip
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    data, *_ = batch(list(range(8)))
    with pytest.raises(ValueError, match=message):
        computed(data, **settings)


# ---- the reward functions that verl ships, unchanged, called as its reward managers call them

ROWS = [
    ("openai/gsm8k", "so 18\n#### 18", "18", 1.0),
    ("openai/gsm8k", "#### 17", "18", 0.0),
    ("lighteval/MATH", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
    ("math_dapo", "Answer: 5", "5", 1.0),
    ("math_dapo", "Answer: 6", "5", -1.0),
    ("searchR1_nq", "<answer>Paris</answer>", {"target": ["Paris"]}, 1.0),
]


@pytest.mark.parametrize(
    "function",
    [
        "default_compute_score",
        "gsm8k:compute_score",
        "math_reward:compute_score",
        "math_batch:compute_score_batched",
    ],
)
def test_its_own_reward_functions_run_unchanged(function: str) -> None:
    from frpo.config import FunctionReward
    from frpo.rewards.calling import FunctionScorer
    from frpo.rewards.parts import part_of
    from frpo.rewards.signature_checks import check_signature
    from frpo.types import Item

    module, _, name = function.rpartition(":")
    source = {"gsm8k": "openai/gsm8k", "math_reward": "lighteval/MATH", "math_batch": "lighteval/MATH"}.get(
        module
    )
    rows = [row for row in ROWS if source in (None, row[0])]
    columns = [
        {"data_source": s, "reward_model": {"style": "rule", "ground_truth": t}, "extra_info": {"index": 0}}
        for s, _, t, _ in rows
    ]
    spec = FunctionReward(
        kind="function", name="theirs", function=f"verl.utils.reward_score{module and '.'}{module}:{name}"
    )
    check_signature(spec, columns[0], "rewards.0")
    items = [Item("p", text, "t", c) for (_, text, _, _), c in zip(rows, columns, strict=True)]
    parts = [part_of(value, spec) for value in FunctionScorer(spec, "rewards.0")(items)]
    assert parts == [(score, None) for *_, score in rows]
    (unknown,) = FunctionScorer(spec, "rewards.0")(
        [Item("p", "x", "t", {"data_source": "nobody's", "ground_truth": "1"})]
    )
    assert isinstance(unknown, NotImplementedError) == (name == "default_compute_score")


WATCHED = """
SEEN = []

def plain(data_source, solution_str, ground_truth, extra_info):
    SEEN.append((data_source, solution_str, ground_truth, dict(extra_info)))
    return {"score": 0.25}

async def later(data_source, solution_str, ground_truth, extra_info):
    return plain(data_source, solution_str, ground_truth, extra_info)
"""


@pytest.mark.parametrize("name", ["plain", "later"])
def test_a_function_is_called_as_by_its_reward_manager(name: str, tmp_path: Path) -> None:
    """What verl's naive reward manager gives a function, it gets from us."""
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

    from frpo.config import FunctionReward
    from frpo.rewards.calling import FunctionScorer
    from frpo.types import Item

    (tmp_path / f"watched_{name}.py").write_text(WATCHED)
    scorer = FunctionScorer(
        FunctionReward(kind="function", name="x", function=f"{tmp_path / f'watched_{name}.py'}:{name}"),
        "rewards.0",
    )
    row = {"data_source": "mine", "reward_model": {"ground_truth": "2"}, "extra_info": {"index": 3}}
    assert scorer([Item("p", "two", "t", row)]) == [0.25]

    columns = {k: np.array([v], dtype=object) for k, v in row.items()}
    tensors = {"responses": torch.tensor([[7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    manager = NaiveRewardManager.__new__(NaiveRewardManager)
    manager.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "two")
    manager.compute_score, manager.is_async_reward_score = scorer.function, name == "later"
    manager.reward_router_address = None

    async def run() -> Any:
        manager.loop = asyncio.get_running_loop()
        return await manager.run_single(DataProto.from_single_dict({**tensors, **columns}))

    assert asyncio.run(run())["reward_score"] == 0.25
    ours, theirs = scorer.function.__globals__["SEEN"]
    assert ours == theirs


def test_a_setting_of_verl_that_our_page_names_is_one() -> None:
    from tests.support.pages import code_in, read_tables

    file = Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    settings = yaml.safe_load(file.read_text())
    tables = [table for table in read_tables("coming_from.md") if table.header[0] == "frpo"]
    said = set(chain.from_iterable(code_in(" ".join(table.column("verl"))) for table in tables))
    assert len(said) > 30
    assert [path for path in sorted(said) if not stands_in(settings, path)] == []


def stands_in(settings: Any, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(settings, dict) or name not in settings:
            return False
        settings = settings[name]
    return True
