"""Which stages a change of the recipe touches."""

from __future__ import annotations

from pathlib import Path

import pytest

from frpo.recipe import load
from frpo.stages import stages_of

TESTBED = Path(__file__).parents[2] / "recipes" / "testbed.yaml"
ARMS = ("grpo", "frpo", "frpo-reverse")
TASKS = ("crafts-gentle", "crafts-harsh")
ALL = {"base", *(f"rlhf/{a}" for a in ARMS), *(f"downstream/{a}/{t}" for a in ARMS for t in TASKS)}


def changed(*sets: str) -> set[str]:
    before, after = ({s.name: s.inputs for s in stages_of(load(TESTBED, given))} for given in ((), sets))
    assert set(before) == ALL
    return {name for name in ALL if before[name] != after.get(name)}


@pytest.mark.parametrize(
    ("setting", "touched"),
    [
        ("seed=1", ALL),
        ("base.num_steps=10", ALL),
        ("evaluate.completions_per_prompt=4", ALL),
        ("rollout.group_size=4", ALL - {"base"}),
        ("data.mix={harmful: 1.0}", ALL - {"base"}),
        ("arms.frpo.objective.lam=0.2", {s for s in ALL if "/frpo" in s and "reverse" not in s}),
        ("downstream.crafts-harsh.learning_rate=0.01", {s for s in ALL if s.endswith("crafts-harsh")}),
        ("cluster.call_timeout_s=5", set()),
        ("checkpoint.every=7", set()),
        ("name=other", set()),
    ],
)
def test_a_change_touches_what_depends_on_it(setting: str, touched: set[str]) -> None:
    assert changed(setting) == touched


def test_data_files_count_by_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    inputs = []
    for text in ('{"prompt": "a"}\n', '{"prompt": "b"}\n'):
        file.write_text(text)
        config = load(TESTBED, (f"data.train=[{{path: {file}, task: t}}]", "data.mix={}"))
        inputs.append({s.name: s.inputs for s in stages_of(config)})
    assert inputs[0]["base"] == inputs[1]["base"]
    assert inputs[0]["rlhf/frpo"] != inputs[1]["rlhf/frpo"]
