"""FRPO inside TRL's GRPOTrainer, on the testbed's model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from frpo import testbed
from frpo.objective import Frpo, Groups, lam_of_radius

pytest.importorskip("trl", reason="trl is not installed")

from tests.support.trainers import PROMPTS, K, make  # needs trl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl") / "model"
    testbed.write_model(folder, seed=0)
    return folder


def words(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    """Something that differs inside a group; None for some."""
    return [None if "sorry" in c else (len(c) % 5) / 4 for c in completions]


@pytest.mark.parametrize("settings", [{"lam": 0.5}, {"rho": 0.3, "scale": "exact", "jackknife": False}])
def test_each_batch_has_our_advantages(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make(model, tmp_path, words, settings)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    inner = trainer._generate_and_score_completions

    def watched(inputs: Any) -> Any:
        scored = inner(inputs)
        seen.append((trainer._rewards[:, 0].clone(), scored["advantages"].clone()))
        assert list(trainer._logs["advantages"])[-len(inputs) :] == scored["advantages"].tolist()
        return scored

    trainer._generate_and_score_completions = watched
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(seen) == 3
    for rewards, advantages in seen:
        groups = rewards.view(PROMPTS, K)
        known = Groups.of(groups.nan_to_num(0.0), ~groups.isnan())
        lam = settings.get("lam") or lam_of_radius(known, settings["rho"])
        estimator = Frpo(lam, settings.get("jackknife", True), settings.get("scale", "code"))
        expected = estimator.advantages(known)
        assert advantages.tolist() == pytest.approx(expected.view(-1).tolist(), abs=1e-6)
        assert all(a == 0 for a, r in zip(advantages.tolist(), rewards.tolist(), strict=True) if r != r)
    assert any(a.abs().max() > 0 for _, a in seen)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_what_frpo_cannot_mean_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FRPO needs sum_then_normalize"):
        make(model, tmp_path, words, {"lam": 0.5}, multi_objective_aggregation="normalize_then_sum")


TWO = """
import sys
from pathlib import Path
import torch
from tests.support.trainers import K, make
from frpo.objective import Frpo, Groups

def marked(prompts, completions, **_):
    return [float(len(c)) for c in completions]

model, out = map(Path, sys.argv[1:3])
trainer = make(model, out, marked, {"lam": 2.0}, per_device_train_batch_size=2, max_steps=2)
inner = trainer._generate_and_score_completions

def watched(inputs):
    found = inner(inputs)
    rewards = trainer._rewards[:, 0]
    assert len(rewards) == 2 * len(inputs) == K, (len(rewards), len(inputs))  # one group over two processes
    expected = Frpo(2.0).advantages(Groups.of(rewards.view(1, K))).view(-1).float()
    rank = trainer.accelerator.process_index
    torch.testing.assert_close(found["advantages"], expected[rank * len(inputs) : (rank + 1) * len(inputs)])
    Path(f"{sys.argv[2]}-{rank}").touch()
    return found

trainer._generate_and_score_completions = watched
trainer.train()
"""


@pytest.mark.slow
def test_a_group_over_two_processes_is_one_group(model: Path, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "two.py"),
    ]
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [*command, str(model), str(tmp_path / "out")],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"out-{rank}").exists() for rank in range(3)] == [True, True, False]


# ---- the reward functions that trl ships, unchanged, called as its trainer calls them

TALK = ({"role": "system", "content": "Think."}, {"role": "user", "content": "1/2 of 1?"})
TEXTS = (r"<think>half</think> It is \boxed{\frac{1}{2}}.", r"\boxed{3}", "no idea " * 20)
SHIPPED = {
    "accuracy_reward": {},
    "reasoning_accuracy_reward": {"reasoning_delimiters": ["</think>"]},
    "think_format_reward": {},
    "get_cosine_scaled_reward": {"max_len": 16},
    "get_repetition_penalty_reward": {"ngram_size": 3, "max_penalty": -1.0},
    "get_soft_overlong_punishment": {"max_completion_len": 12, "soft_punish_cache": 6},
}


@pytest.mark.parametrize("solution", [r"$\frac{1}{2}$", "no formula at all"])
def test_its_own_reward_functions_run_unchanged(solution: str) -> None:
    import trl.rewards

    from frpo.config import FunctionReward
    from frpo.rewards.scoring import RewardScorer
    from frpo.rewards.signature_checks import check_signature
    from frpo.types import Item

    assert set(SHIPPED) == set(trl.rewards._import_structure["accuracy_rewards"]) | set(
        trl.rewards._import_structure["format_rewards"] + trl.rewards._import_structure["other_rewards"]
    )
    columns = {"solution": solution, "level": 3}
    specs = [
        FunctionReward(kind="function", name=n, function=f"trl.rewards:{n}", arguments=a)
        for n, a in SHIPPED.items()
    ]
    items = [
        Item(
            TALK[-1]["content"],
            text,
            "t",
            columns,
            messages=TALK,
            conversational=True,
            completion_ids=tuple(range(5 * i)),
        )
        for i, text in enumerate(TEXTS, 1)
    ]
    scorer = RewardScorer(specs)
    rewards = scorer.score(items)
    scorer.close()
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    ids = [list(range(5 * i)) for i, _ in enumerate(TEXTS, 1)]
    for spec in specs:
        check_signature(spec, columns, "rewards.0")
        function, arguments = getattr(trl.rewards, spec.name), dict(spec.arguments)
        if spec.name.startswith("get_"):
            function, arguments = function(**arguments), {}
        expected = function(
            prompts=[list(TALK)] * 3,
            completions=completions,
            completion_ids=ids,
            solution=[solution] * 3,
            level=[3] * 3,
            **arguments,
        )
        assert [r.parts.get(spec.name) for r in rewards] == pytest.approx(expected), spec.name
        assert not any(spec.name in str(r.error) for r in rewards)
