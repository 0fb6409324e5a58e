"""Which stages a change of the recipe touches."""

from __future__ import annotations

from itertools import chain, product
from pathlib import Path

import pytest

from frpo.config import Config, ConfigError, DownstreamRl
from frpo.content import Digests
from frpo.disk import sha256_of_json
from frpo.metrics import RunLog
from frpo.outline import Stage, list_stages
from frpo.prompts import PromptStream
from frpo.recipe import load_recipe
from frpo.stages.graph import made_from
from frpo.stages.inputs import Inputs, resolve_testbed

TESTBED = Path(__file__).parents[2] / "recipes" / "testbed.yaml"
ARMS = ("grpo", "frpo", "grpo-reverse", "frpo-reverse")
TASKS = ("crafts-gentle", "crafts-harsh")
ALL = {
    "base",
    *(f"rlhf/{a}" for a in ARMS),
    *(f"downstream/{arm}/{task}" for arm, task in product(ARMS, TASKS)),
}


def digests_of(config: Config) -> dict[str, str]:
    return {stage.name: made.digest for stage, made in made_from(config, Digests(config.folder))}


def changed(*sets: str) -> set[str]:
    before, after = (digests_of(load_recipe(TESTBED, given)) for given in ((), sets))
    assert set(before) == ALL
    return {name for name in ALL if before[name] != after.get(name)}


@pytest.mark.parametrize(
    ("setting", "touched"),
    [
        ("seed=1", ALL),
        ("model.dtype=bfloat16", ALL),
        ("rewards.0.weight=2.0", ALL),
        ("rewards.0.scale=2.0", ALL),
        ("combine=mean", ALL),
        ("base.num_steps=10", ALL),
        ("evaluate.completions_per_prompt=4", ALL),
        ("rollout.group_size=4", ALL - {"base"}),
        ("rollout.temperature=0.5", ALL - {"base"}),
        ("learner.learning_rate=0.01", ALL - {"base"}),
        ("data.mix={harmful: 1.0}", ALL - {"base"}),
        ("arms.frpo.objective.estimator.lam=0.2", {s for s in ALL if "/frpo" in s and "reverse" not in s}),
        ("downstream.crafts-harsh.learning_rate=0.01", {s for s in ALL if s.endswith("crafts-harsh")}),
        ("cluster.call_timeout_s=5", set()),
        ("checkpoint.every=7", set()),
        ("name=other", set()),
    ],
)
def test_a_change_touches_what_depends_on_it(setting: str, touched: set[str]) -> None:
    assert changed(setting) == touched


def test_certificates_attacks_and_rl_stand_on_the_arms_policy() -> None:
    rl = (
        "downstream=[{kind: rl, name: more, data: [{path: 'testbed:prompts', task_column: task}], "
        "learner: {num_steps: 7}}]"
    )
    sets = ("certify={}", "attack={radii: [0.2, 1.0], num_steps: 5}", rl)
    stages: dict[str, Stage] = {s.name: s for s in list_stages(load_recipe(TESTBED, sets))}
    per_arm = [
        [f"rlhf/{a}", f"certify/{a}", f"downstream/{a}/more", f"attack/{a}/0.2", f"attack/{a}/1"]
        for a in ARMS
    ]
    assert list(stages) == ["base", *chain.from_iterable(per_arm)]
    assert stages["attack/frpo/1"].values() == {"attack.radii": 1.0}
    (task,) = load_recipe(TESTBED, sets).downstream
    assert isinstance(task, DownstreamRl)
    assert (task.learner.num_steps, task.learner.learning_rate, task.objective.estimator.kind) == (
        7,
        1e-3,
        "grpo",
    )  # the run's learner, but for the steps
    before, other = (
        digests_of(load_recipe(TESTBED, sets)),
        digests_of(load_recipe(TESTBED, ("certify={completions_per_prompt: 8}", *sets[1:]))),
    )
    assert [n for n in stages if before[n] != other[n]] == [f"certify/{a}" for a in ARMS]


def test_benchmarks_follow_every_policy_and_change_with_the_task_file(tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    digests = []
    for text in ("task: a", "task: b"):
        task.write_text(text)
        digests.append(digests_of(load_recipe(TESTBED, (f"harness={{tasks: [{task}]}}",))))
    harness = {
        "harness/base",
        *(f"harness/{a}" for a in ARMS),
        *(f"harness/{arm}/{task}" for arm, task in product(ARMS, TASKS)),
    }
    assert set(digests[0]) == ALL | harness
    assert {n for n in digests[0] if digests[0][n] != digests[1][n]} == harness
    order = list(digests[0])
    assert order[:3] == ["base", "harness/base", "rlhf/grpo"]
    assert order.index("harness/grpo/crafts-harsh") == order.index("downstream/grpo/crafts-harsh") + 1


def test_data_files_count_by_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    inputs = []
    for text in ('{"prompt": "a"}\n', '{"prompt": "b"}\n'):
        file.write_text(text)
        config = load_recipe(TESTBED, (f"data.train=[{{path: {file}, task: t}}]", "data.mix={}"))
        inputs.append(digests_of(config))
    assert inputs[0]["base"] == inputs[1]["base"]
    assert inputs[0]["rlhf/frpo"] != inputs[1]["rlhf/frpo"]


@pytest.mark.long
def test_an_attack_on_one_task_takes_its_prompts_alone(tmp_path: Path) -> None:
    attack = "attack={radii: [0.2], num_steps: 5, mix: {harmful: 1.0}}"
    assert digests_of(load_recipe(TESTBED, (attack,))) != digests_of(
        load_recipe(TESTBED, (attack, "attack.mix={}"))
    )
    config = resolve_testbed(load_recipe(TESTBED, (attack, f"run_dir={tmp_path}")))
    assert config.attack
    with RunLog(tmp_path, config) as log:
        stream = PromptStream(Inputs(config, log).train, config.attack.mix, 0, 24)
        assert {prompt.task for prompt in chain.from_iterable(map(stream.take, range(3)))} == {"harmful"}
        for field in ("data.mix", "attack.mix"):
            wrong = resolve_testbed(
                load_recipe(TESTBED, (attack, f"run_dir={tmp_path}", f"{field}={{harmfull: 1}}"))
            )
            with pytest.raises(
                ConfigError,
                match=rf"{field}.harmfull: no training prompt has this task; "
                r"the tasks are \['harmful', 'harmless'\]",
            ):
                Inputs(wrong, log)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("arms.frpo.objective.gate={tasks: [harmfull]}", "arms.frpo.objective.gate.tasks"),
        ("arms.grpo.objective.beta_of={harmfull: 0.5}", "arms.grpo.objective.beta_of"),
    ],
)
def test_a_penalty_of_a_task_that_no_prompt_has_is_refused(setting: str, field: str, tmp_path: Path) -> None:
    config = resolve_testbed(load_recipe(TESTBED, (setting, f"run_dir={tmp_path}")))
    with RunLog(tmp_path, config) as log, pytest.raises(ConfigError, match=rf"{field}.harmfull: no training"):
        Inputs(config, log)


@pytest.mark.long
def test_every_seed_has_a_testbed_of_its_own_in_the_same_folder(tmp_path: Path) -> None:
    resolved = [
        resolve_testbed(load_recipe(TESTBED, (f"run_dir={tmp_path}", f"seed={seed}"))) for seed in (0, 1, 0)
    ]
    bases = [c.base.data[0].path for c in resolved if c.base]
    assert Path(bases[0]).read_text() != Path(bases[1]).read_text()
    weights = [(Path(c.model.path) / "model.safetensors").read_bytes() for c in resolved]
    assert weights[0] == weights[2] != weights[1]
    with pytest.raises(
        ConfigError, match="testbed:nothing: the testbed has no such data; it has base, prompts"
    ):
        digests_of(load_recipe(TESTBED, ("data.train.0.path=testbed:nothing",)))


def test_what_a_stage_is_made_from_is_told_by_the_paths_of_the_recipe() -> None:
    config = load_recipe(TESTBED)
    made = {stage.name: made for stage, made in made_from(config, Digests(config.folder))}
    assert made["base"].below == ""
    arm = made["rlhf/frpo"]
    assert arm.below == made["base"].digest
    assert arm.values["rollout.group_size"] == config.rollout.group_size
    assert arm.values["arms.frpo.objective.estimator.lam"] == 0.5
    assert "arms.grpo.objective.beta" not in arm.values
    assert arm.named["data.train.0.path"] == "testbed:prompts"
    assert set(arm.named) <= set(arm.values)


def test_the_order_of_fields_changes_no_digest() -> None:
    assert sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1})
