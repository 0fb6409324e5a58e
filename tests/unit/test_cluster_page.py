"""docs/cluster.md: the options that it gives to Ray are there, and its example asks for what it says."""

from __future__ import annotations

import re
import shlex
from itertools import chain
from pathlib import Path

import pytest
import yaml

from frpo.planning import plan_run
from frpo.recipe import load_recipe
from tests.support.pages import ROOT, read_tables

PAGE = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = list(
    chain.from_iterable(
        text.replace("\\\n", " ").splitlines() for language, text in BLOCKS if language == "bash"
    )
)


def test_the_example_asks_for_the_gpus_and_bundles_that_the_page_says(tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "paper_safety_qwen.yaml").read_text())
    (example,) = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
    for name, section in example.items():
        recipe[name] = (recipe[name] if name == "learner" else {}) | section
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    asked = plan_run(load_recipe(file))
    said = re.search(r"That is (\d+) GPUs in (\d+) bundles", PAGE)
    assert said
    assert (asked.num_gpus, len(asked.bundles)) == (int(said[1]), int(said[2])) == (16, 13)
    (table,) = [table for table in read_tables("cluster.md") if table.header[0] == "role"]
    gpus = {actor.role: (len(actor.bundles), actor.num_gpus) for actor in asked.actors}
    gpus["learner"] = (len(asked.actors[0].bundles), asked.bundles[0]["GPU"])  # shared with the fine-tune's
    assert {(role, int(bundles), float(each)) for role, bundles, each in table.rows} == {
        (role, *gpus[role]) for role in gpus.keys() - {"finetune"}
    }


@pytest.mark.long
def test_every_command_for_ray_has_the_options_of_the_page() -> None:
    from ray.dashboard.modules.job.cli import job_cli_group
    from ray.scripts.scripts import cli

    known = {("job", name): command for name, command in job_cli_group.commands.items()}
    known |= {(name,): command for name, command in cli.commands.items()}
    seen = 0
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[:1] != ["ray"]:
            continue
        name = tuple(words[1:3]) if words[1] == "job" else (words[1],)
        options = set(chain.from_iterable(parameter.opts for parameter in known[name].params))
        given = words[: words.index("--")] if "--" in words else words
        assert {word for word in given if word.startswith("--")} <= options, line
        seen += 1
    assert seen == 4
