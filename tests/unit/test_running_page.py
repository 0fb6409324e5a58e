"""docs/running.md: its recipe for one GPU asks for one, and the numbers that it names are measured."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import yaml

from frpo.planning import plan_run
from frpo.recipe import load_recipe
from frpo.stats import BatchStats, UpdateStats
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


def test_the_numbers_that_the_page_names_stand_in_a_row_of_a_step() -> None:
    text = PAGE.partition("## What a run leaves")[2].partition("\n## ")[0]
    named = re.findall(r"`(batch|update)\.(\w+)`", text)
    known = {"batch": BatchStats, "update": UpdateStats}
    assert len(named) > 5
    assert [name for part, name in named if name not in {field.name for field in fields(known[part])}] == []
