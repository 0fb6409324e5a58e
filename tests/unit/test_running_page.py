"""docs/running.md: its recipe for one GPU asks for one."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from frpo.planning import plan_run
from frpo.recipe import load_recipe
from tests.support.pages import ROOT

PAGE = (ROOT / "docs" / "running.md").read_text()


def test_the_example_puts_every_role_on_one_card(tmp_path: Path) -> None:
    (example,) = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)]
    recipe = yaml.safe_load((ROOT / "frpo" / "templates" / "data" / "recipe.yaml").read_text())
    for name, section in example.items():
        recipe[name] = recipe.get(name, {}) | section
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    asked = plan_run(load_recipe(file))
    assert asked.num_gpus == 1
    assert {actor.role for actor in asked.actors if actor.num_gpus > 0} == {
        "learner",
        "finetune",
        "rollout",
        "reference",
        "evaluate",
    }
