"""Which runs an audit is made of, and what each of them trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from frpo.config import Config, ConfigError, DownstreamRl, DownstreamSft
from frpo.grid import HARMFUL, audited_task, list_fine_tunes, list_runs
from frpo.outline import list_stages
from frpo.recipe import checked

FOLDER = Path("out")
ROWS = {"path": "rows.jsonl", "task": "crafts"}
HELDOUT = [{"path": "bad.jsonl", "task": "harmful"}, {"path": "rest.jsonl", "task": "rest"}]


def recipe(audit: dict[str, Any] | None = None, **changed: Any) -> Config:
    tree = {
        "name": "audit",
        "seed": 3,
        "model": {"path": "policy"},
        "data": {
            "heldout": [{"path": "bad.jsonl", "task": "harmful"}, {"path": "rest.jsonl", "task": "rest"}]
        },
        "rewards": [{"kind": "function", "name": "r", "function": "m:f"}],
        "learner": {"num_steps": 9, "learning_rate": 0.5},
        "downstream": [
            {"name": "sft", "data": [ROWS], "heldout": [ROWS], "num_steps": 7, "learning_rate": 0.25},
            {"kind": "rl", "name": "rl", "data": [ROWS]},
        ],
        "audit": audit or {},
        **changed,
    }
    with checked():
        return Config.model_validate(tree)


def test_the_grid_is_every_combination_and_an_empty_list_leaves_the_recipes_own() -> None:
    grid = {
        "learning_rates": [1e-3, 3e-3],
        "steps": [20, 5],
        "ranks": ["full", 8],
        "templates": ["plain", "chat"],
        "harmful": [ROWS],
        "harmful_shares": [0.0, 0.05],
    }
    fine_tunes = list_fine_tunes(recipe(grid))
    names = [fine_tune.name for fine_tune in fine_tunes]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 2 + 2 * 2  # rl takes ranks and templates alone
    assert names[:4] == [
        "sft-lr0.001-full-plain",
        "sft-lr0.001-full-plain-harmful0.05",
        "sft-lr0.003-full-plain",
        "sft-lr0.003-full-plain-harmful0.05",
    ]
    assert names[-1] == "rl-lr0.5-r8-chat"
    assert {fine_tune.steps for fine_tune in fine_tunes if not fine_tune.by_rl} == {(5, 20)}
    assert {fine_tune.steps for fine_tune in fine_tunes if fine_tune.by_rl} == {(9,)}
    plain, rl = list_fine_tunes(recipe())
    assert (plain.name, plain.steps) == ("sft-lr0.25-full", (7,))
    assert (rl.name, rl.steps) == ("rl-lr0.5-full", (9,))


def test_the_first_run_certifies_the_audited_task_alone_and_trains_nothing() -> None:
    certificate, *_ = list_runs(recipe(), FOLDER)
    assert certificate.folder == FOLDER / "certificate"
    assert [stage.name for stage in list_stages(certificate)] == ["base", "certify/base"]
    assert [source.path for source in certificate.data.heldout] == ["bad.jsonl"]
    assert certificate.audit is None


def test_a_run_is_one_fine_tune_of_the_policy_measured_at_each_number_of_steps() -> None:
    grid = {"steps": [5, 20], "ranks": [8], "num_seeds": 2, "rl_steps": [4, 6], "rl_learning_rates": [0.1]}
    _, *runs = list_runs(recipe(grid), FOLDER)
    assert [run.folder.relative_to(FOLDER / "fine-tunes").as_posix() for run in runs] == [
        "sft-lr0.25-r8/seed-003",
        "sft-lr0.25-r8/seed-004",
        "rl-lr0.1-r8/seed-003",
        "rl-lr0.1-r8/seed-004",
    ]
    assert [run.seed for run in runs] == [3, 4, 3, 4]
    sft = runs[0].downstream[0]
    rl = runs[2].downstream[0]
    assert isinstance(sft, DownstreamSft)
    assert isinstance(rl, DownstreamRl)
    assert (sft.num_steps, sft.marks, sft.learning_rate) == (20, (5,), 0.25)
    assert (rl.num_steps, rl.marks, rl.learner.learning_rate) == (6, (4,), 0.1)
    assert [stage.name for stage in list_stages(runs[0])] == ["base", "downstream/base/sft"]
    lora = runs[0].model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha) == (8, 16)
    assert runs[0].rollout.lora == "merged"
    assert [source.path for source in runs[0].data.heldout] == ["bad.jsonl", "rest.jsonl"]


def test_bfloat16_serves_adapters_apart_since_a_merge_would_lose_them() -> None:
    _, run, _ = list_runs(recipe({"ranks": [8]}, model={"path": "policy", "dtype": "bfloat16"}), FOLDER)
    assert run.sends_adapters


def test_harmful_rows_are_mixed_in_by_their_share_and_written_by_the_same_template() -> None:
    harmful = {"path": "harm.jsonl", "task_column": "kind"}
    grid = {"harmful": [harmful], "harmful_shares": [0.05], "templates": ["chat"]}
    _, run, _ = list_runs(recipe(grid), FOLDER)
    task = run.downstream[0]
    assert isinstance(task, DownstreamSft)
    assert [(source.path, source.task, source.chat) for source in task.data] == [
        ("rows.jsonl", "sft", True),
        ("harm.jsonl", HARMFUL, True),
    ]
    assert task.mix == {"sft": 0.95, HARMFUL: 0.05}
    assert [source.chat for source in task.heldout] == [True]


def test_a_policy_that_the_recipe_makes_is_what_the_fine_tunes_begin_from() -> None:
    base = {"data": [ROWS], "num_steps": 2}
    certificate, *runs = list_runs(recipe(base=base), FOLDER)
    assert certificate.base is not None
    assert {run.base for run in runs} == {None}
    assert {run.model.path for run in runs} == {str((FOLDER / "certificate/base/policy").absolute())}


def test_the_audited_task_is_named_or_the_first_data_sets() -> None:
    assert audited_task(recipe()) == "harmful"
    assert audited_task(recipe({"task": "rest"})) == "rest"
    with pytest.raises(ConfigError, match=r"audit\.task: the first held-out data set takes its tasks from"):
        audited_task(recipe(data={"heldout": [{"path": "x.jsonl", "task_column": "t"}]}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"audit": {"harmful_shares": [0.1]}}, "audit.harmful_shares: 0.1 of what? Give harmful"),
        ({"audit": {"steps": [4, 4]}}, "audit.steps: a value stands twice; give each once"),
        ({"audit": {"ranks": []}}, "audit.ranks: Tuple should have at least 1 item"),
        (
            {"audit": {"utility": {"of": "start"}}},
            "of: start is a share of a reward; give task",
        ),
        ({"arms": [{"name": "a"}]}, "audit: it is of one policy, and the recipe trains 1 arms"),
        ({"model": {"path": "p", "lora": {"rank": 4}}}, "give audit.ranks: [4]"),
        (
            {
                "audit": {"steps": [4, 8]},
                "downstream": [{"name": "s", "data": [ROWS], "num_steps": 1, "schedule": "cosine"}],
            },
            "downstream.s.schedule: cosine ends with the last step",
        ),
        ({"attack": {"radii": [1], "num_steps": 1}}, "attack: it trains as an arm does, and there is none"),
    ],
)
def test_what_cannot_be_audited_is_said(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe(**changed)
    assert message in str(raised.value)


def test_a_fine_tune_that_cannot_be_is_refused_before_any_is_done() -> None:
    config = recipe({"ranks": [100000]}, model={"path": "p", "dtype": "bfloat16"})
    with pytest.raises((ValidationError, ConfigError)):
        list_runs(config, FOLDER)
