"""What a wheel holds, and what an installed frpo does in an empty folder: recipes by name, `frpo init`."""

from __future__ import annotations

from pathlib import Path

import pytest

from frpo.config import ConfigError
from frpo.recipe import SHIPPED, dump_config, find_recipe, load_recipe
from tests.support.command_line import CommandLine

ROOT = Path(__file__).parents[2]
NAMES = ["audit_testbed", "paper_math_qwen", "paper_safety_mistral", "paper_safety_qwen", "testbed"]
FILES = {
    "frpo/py.typed",
    *(f"frpo/recipes/{name}.yaml" for name in NAMES),
    *(f"frpo/report/{name}.j2" for name in ("audit.html", "page.html", "style.css", "sweep.html")),
    *(f"frpo/templates/data/{name}" for name in ("prompts.jsonl", "recipe.yaml", "rewards.py")),
    "frpo/templates/rewards/rewards.yaml",
    "frpo/templates/testbed/testbed.yaml",
}
"""All that is no module."""


# ---- recipes by name


def test_a_name_is_a_recipe_of_ours_unless_a_file_here_bears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("testbed")).name == "testbed"
    Path("testbed").mkdir()  # a folder is no recipe
    assert find_recipe(Path("testbed")) == SHIPPED / "testbed.yaml"
    Path("testbed").rmdir()
    Path("testbed").write_text("name: own")
    assert find_recipe(Path("testbed")) == Path("testbed")


def test_every_recipe_that_comes_along_is_the_repositorys_and_needs_no_other_file_of_it() -> None:
    assert sorted(path.stem for path in SHIPPED.iterdir()) == NAMES
    for name in NAMES:
        assert (SHIPPED / f"{name}.yaml").resolve() == ROOT / "recipes" / f"{name}.yaml"
        text = dump_config(load_recipe(Path(name)))
        assert [place for place in ("../", "recipes/", "examples/", "runs/") if place in text] == []


@pytest.mark.parametrize(
    "command",
    [("run",), ("sweep",), ("chaos",), ("plan",), ("config",), ("doctor",), ("audit", "--recipe")],
    ids=lambda words: words[0],
)
def test_every_command_that_takes_a_recipe_takes_its_name(
    command: tuple[str, ...], frpo: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert frpo.refuses(*command, "tesbed") == (
        "recipe tesbed: No such file or directory; give the path of a YAML file, or the name of one that "
        f"comes with frpo: {', '.join(NAMES)}\n"
    )
    assert "seed: Input should be a valid integer" in frpo.refuses(*command, "testbed", "--set", "seed=x")


def test_a_path_that_cannot_be_looked_at_is_told_by_whoever_reads_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        load_recipe(tmp_path / "file" / "recipe.yaml")
