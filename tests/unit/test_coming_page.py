"""docs/coming_from.md: the fields and values of ours that it names are there, TRL's too, and the reward
functions that it shows run unchanged."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from frpo.config import Config, FunctionReward, Section
from frpo.rewards.calling import FunctionScorer
from frpo.rewards.parts import part_of
from frpo.rewards.signature_checks import check_signature
from frpo.types import Item
from tests.support.pages import ROOT, code_in, read_tables

SETTINGS = [table for table in read_tables("coming_from.md") if table.header[0] == "frpo"]


def named_in(column: str) -> set[str]:
    """Code in the cells of a column of all tables."""
    return set(chain.from_iterable(code_in(" ".join(table.column(column))) for table in SETTINGS))


OURS = sorted(named_in("frpo"))
PAGE = (ROOT / "docs" / "coming_from.md").read_text()


def walk_fields(annotation: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every path below a section, without the numbers of lists, and its annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            below = f"{path}.{name}".lstrip(".")
            yield below, field.annotation
            yield from walk_fields(field.annotation, below)
        return
    for part in get_args(annotation):
        yield from walk_fields(part, path)


def values_of(annotation: Any) -> set[str]:
    """What may stand there, where it is one of a few words."""
    if get_origin(annotation) is Annotated:
        return values_of(get_args(annotation)[0])
    return {value for value in get_args(annotation) if isinstance(value, str)}


FIELDS: dict[str, set[str]] = {}
for path, annotation in walk_fields(Config):
    FIELDS.setdefault(path, set()).update(values_of(annotation))


@pytest.mark.parametrize("said", OURS)
def test_a_field_of_the_page_is_one_of_a_recipe(said: str) -> None:
    path, _, value = said.partition(": ")
    assert path in FIELDS
    assert not value or value in FIELDS[path]


def test_the_page_compares_what_a_trainer_asks_for() -> None:
    assert len(OURS) > 50
    sections = {table.section for table in SETTINGS}
    assert sections == {"Batches", "Objective", "Training", "Where things run", "Data"}


@pytest.mark.long
def test_a_field_of_trl_is_one() -> None:
    trl = pytest.importorskip("trl")
    known = {field.name for field in fields(trl.GRPOConfig)}
    known |= set(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    known |= {"accelerate launch", "prompt"}  # a command, and the column of its data sets
    said = {code.partition("=")[0] for code in named_in("TRL")}
    assert len(said) > 30
    assert said - known == set()


@pytest.mark.parametrize("name", ["overlap", "compute_score", "reward_func"])
def test_a_reward_function_of_each_trainer_runs_as_the_page_has_it(name: str, tmp_path: Path) -> None:
    (code,) = re.findall(r'^```python title="rewards.py"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
    file = tmp_path / f"{name}_rewards.py"  # two files of one name would be told apart, and so here
    file.write_text(code)
    reward = FunctionReward(kind="function", name="r", function=f"{file}:{name}")
    columns = {"answer": "4"}
    check_signature(reward, columns.keys(), "rewards.0")
    items = [Item("2 + 2 =", text, "maths", columns) for text in ("it is 4", "it is 5")]
    values = [part_of(value, reward) for value in FunctionScorer(reward, "rewards.0")(items)]
    assert values == [(1.0, None), (0.0, None)]


def test_the_recipe_of_the_page_names_a_function_of_it() -> None:
    (named,) = re.findall(r'function: "rewards.py:(\w+)"', PAGE)
    assert f"def {named}(" in PAGE
