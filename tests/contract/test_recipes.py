"""Every YAML in the repository parses; every recipe plans; cluster.yaml is valid by Ray's own schema."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from frpo.outline import list_stages
from frpo.planning import plan_run
from frpo.preflight import check_tasks
from frpo.recipe import dump_config, load_recipe
from frpo.rewards.loading import load_function

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {r.stem for r in RECIPES} >= {
        "testbed",
        "smollm2_safety",
        "paper_safety_mistral",
        "paper_safety_qwen",
        "paper_math_qwen",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads_plans_and_its_rewards_resolve(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe)
    assert config.name == recipe.stem
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_recipe(tmp_path / "again.yaml") == config
    asked = plan_run(config)
    roles = {"rollout", "reward", "learner", "finetune", "evaluate"}
    if config.arms and config.reference.share is None:
        roles.add("reference")
    assert {a.role for a in asked.actors} - {"harness"} == roles
    assert [s.name for s in asked.stages] == [s.name for s in list_stages(config)]
    check_tasks(config)
    for reward in config.rewards:
        if reward.kind == "function":
            assert callable(load_function(reward.function))


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes" / "studies").glob("testbed_*.yaml")), ids=lambda p: p.stem
)
def test_a_study_is_the_testbed_with_other_arms(recipe: Path) -> None:
    """So that its figures speak of the demo: what is trained, on what and how long, is the same."""
    study, testbed = load_recipe(recipe), load_recipe(ROOT / "recipes" / "testbed.yaml")
    assert study.name == recipe.stem
    for part in ("model", "base", "data", "rollout", "learner"):
        assert getattr(study, part) == getattr(testbed, part), part
    assert tuple(reward for reward in study.rewards if reward.weight) == testbed.rewards


def test_the_methods_of_the_smollm2_study_are_steered_to_kls_that_overlap() -> None:
    study = load_recipe(ROOT / "recipes" / "studies" / "smollm2_kl.yaml")
    aims = [(a.objective.estimator.kind, a.objective.target_kl) for a in study.arms]
    assert aims == [("grpo", 2.5), ("frpo", 2.5), ("grpo", 1.5), ("frpo", 3.5), ("frpo", 1.5)]
    assert [d.marks for d in study.downstream] == [(6, 12), (6, 12)]  # and the last step: three marks
    assert (
        study.evaluate.completions_per_prompt,
        study.certify and study.certify.completions_per_prompt,
    ) == (16, 64)
    assert plan_run(study).num_cpus == 2  # one seed at a time on two cores: a team takes 14 GiB


def test_no_reference_actor_without_a_penalty_and_shared_bundles() -> None:
    arms = "arms=[{name: a, objective: {beta: 0.0}}, {name: b, objective: {beta: 0.0}}]"
    asked = plan_run(
        load_recipe(
            ROOT / "recipes" / "testbed.yaml", (arms, "learner.num_workers=2", "rollout.num_workers=3")
        )
    )
    places = {a.role: a.bundles for a in asked.actors}
    assert places == {
        "learner": (0, 1),
        "finetune": (0, 1),
        "rollout": (2, 3, 4),
        "reward": (5,),
        "evaluate": (6,),
    }
    assert asked.bundles == ({"CPU": 0.25},) * 5 + ({"CPU": 0.125}, {"CPU": 0.25})


def test_the_papers_ladder_is_as_published() -> None:
    config = load_recipe(ROOT / "recipes" / "paper_safety_mistral.yaml")
    ladder = {
        a.name: (a.objective.estimator.temperature, a.objective.beta)
        for a in config.arms
        if a.objective.estimator.kind == "frpo"
    }
    assert ladder == {
        "frpo-lam5": (5.0, 2e-4),
        "frpo-lam2": (2.0, 5e-4),
        "frpo-lam1": (1.0, 1e-3),
        "frpo-lam0.5": (0.5, 2e-3),
        "frpo-lam0.2": (0.2, 5e-3),
    }
    assert config.rollout.prompts_per_step * config.rollout.group_size == 128


@pytest.mark.long
def test_every_yaml_parses() -> None:
    skipped = {".venv", ".venv-verl", "runs", ".git"}
    files = [p for p in ROOT.rglob("*.y*ml") if not skipped & set(p.relative_to(ROOT).parts)]
    assert len(files) >= 6
    for path in files:
        assert list(yaml.safe_load_all(path.read_text())), path
