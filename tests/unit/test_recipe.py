"""Recipe files and --set: what is read as what, and one line with the exact field for each mistake."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml

from frpo import tree
from frpo.config import Config, ConfigError, FrpoEstimator, GrpoEstimator
from frpo.config.service import ServiceConfig
from frpo.recipe import dump_config, load_recipe, read_section

TESTBED = Path(__file__).parents[2] / "recipes" / "testbed.yaml"


def refusal(text: str | bytes, tmp_path: Path, *sets: str) -> str:
    file = tmp_path / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.perf_counter()
    with pytest.raises(ConfigError) as raised:
        load_recipe(file, sets)
    assert time.perf_counter() - began < 3
    return str(raised.value).replace(str(file), "FILE")


MISTAKES = [
    ("learner.num_steps=x",
     "learner.num_steps: Input should be a valid integer, unable to parse string as an integer (value 'x')"),
    ("learner.num_steps=yes", "learner.num_steps: Input should be a number, not yes or no (value True)"),
    ("learner.zero_stage=true", "learner.zero_stage: Input should be a number, not yes or no (value True)"),
    ("certify.radii=[0.1, no]", "certify.radii: Input should be a number, not yes or no (value a list of 2)"),
    ("learner.num_steps=-0", "learner.num_steps: Input should be greater than 0 (value 0)"),
    ("learner.num_steps=99999999999",
     "learner.num_steps: Input should be less than 2147483648 (value 99999999999)"),
    ("rollout.num_workers=100000000", "rollout.num_workers: 100000000 actors; use at most 4096"),
    ("seed=-1", "seed: Input should be greater than or equal to 0 (value -1)"),
    ("objective.beta=.nan", "objective.beta: Input should be a finite number (value nan)"),
    ("objective.estimator.lam=1e400", "objective.estimator.lam: Input should be a finite number (value inf)"),
    ("learner.stop_at_reward=-.inf", "learner.stop_at_reward: Input should be a finite number (value -inf)"),
    ("objective.estimator.lamb=3", "objective.estimator.lamb: unknown field (value 3); did you mean lam?"),
    ("objective.estimator.kind=ppo", "objective.estimator.kind: 'ppo' is unknown; choose frpo, grpo or rloo"),
    ("objective.estimator=grpo", "objective.estimator: Input should be fields with values (value 'grpo')"),
    ("arms.grpo.objective.estimator.lam=3",
     "arms.0.objective.estimator.lam: it is a field of frpo, and the kind here is grpo (value 3)"),
    ("objective.lam=0.5",
     "objective.lam: it is a field of the estimator; "
     "write objective.estimator: {kind: frpo, lam: 0.5} (value 0.5)"),
    ("objective.method=grpo",
     "objective.method: it is the kind of the estimator; "
     "write objective.estimator: {kind: grpo} (value 'grpo')"),
    ("objectiv.lam=3", "objectiv: unknown field (value fields lam); did you mean objective?"),
    ("rewards.0.wieght=2", "rewards.0.wieght: unknown field (value 2); did you mean weight?"),
    ("downstream.0.num_stepz=2", "downstream.0.num_stepz: unknown field (value 2); did you mean num_steps?"),
    ("model.1=2", "model.1: unknown field (value 2); `frpo config` lists the fields"),
    ("rewards.0.api_key=sk-12345",
     "rewards.0.api_key: unknown field (value not shown); `frpo config` lists the fields"),
    ("model.path=5", "model.path: Input should be a valid string (value 5); put it in quotes"),
    ("rewards.0.function=5",
     "rewards.0.function: Input should be a valid string (value 5); put it in quotes"),
    ("rewards.0.timeout_s=0", "rewards.0.timeout_s: Input should be greater than 0 (value 0)"),
    ("rewards=[{kind: model, name: m, path: [a]}]",
     "rewards.0.path: Input should be a valid string (value a list of 1)"),
    ("rewards=[{kind: functoin, name: m}]",
     "rewards.0.kind: 'functoin' is unknown; choose function, model, judge, url or serve"),
    ("rewards=[{name: m}]", "rewards.0.kind: missing; choose function, model, judge, url or serve"),
    ("rewards=[5]", "rewards.0: Input should be fields with values (value 5)"),
    ("rewards={a: 1}", "rewards: Input should be a list (value fields a)"),
    ("rewards=[{kind: url, name: u, urls: ['ftp://me:pw@far/x']}]",
     "rewards.0.urls.0: 'ftp://...@far/x' is no http:// or https:// address, "
     "such as http://127.0.0.1:8000/get_reward (value 'ftp://...@far/x')"),
    ("learner.num_steps=0x" + "f" * 4000,
     "learner.num_steps: Input should be a valid integer, "
     f"unable to parse string as an integer (value '0x{'f' * 57}...)"),
    ("objective.estimator.lam=!!bool x",
     "--set objective.estimator.lam: not valid YAML: 'x' is no truth value"),
    ("objective.estimator.lam=!!timestamp x",
     "--set objective.estimator.lam: not valid YAML: a value of kind timestamp; leave the tag out"),
    ("rewards.0.arguments={a: !!binary gICA}",
     "--set rewards.0.arguments: not valid YAML: a value of kind binary; leave the tag out"),
    ("data.mix={1: 2}", "data.mix.1: Input should be a valid string (value 1); put it in quotes"),
    ("data.train=[]", "data.train: a list of 0; every arm is trained on prompts, give some"),
    ("arms=[{name: a, objective: []}]",
     "arms.0.objective: Input should be fields with values (value a list of 0)"),
    ("arms=[{name: a, learner: false}]", "arms.0.learner: Input should be fields with values (value False)"),
    ("downstream=[{kind: rl, name: d, data: [{path: a, task: t}], learner: ''}]",
     "downstream.0.learner: Input should be fields with values (value '')"),
    ("model.lora.targets=[]",
     "model.lora.targets: Tuple should have at least 1 item after validation, "
     "not 0 or 'all-linear' (value a list of 0)"),
    ("model.path=''", "model.path: this is no path; give one, or leave the field out (value '')"),
    ("run_dir=''", "run_dir: this is no path; give one, or leave the field out (value '')"),
    ("run_dir=a/" + "b" * 300,
     "run_dir: no path has more than 4095 bytes, or 255 between two slashes; "
     f"give a shorter one (value 'a/{'b' * 57}...)"),
    ("downstream.0.kind=dpo", "downstream.0.kind: 'dpo' is unknown; choose sft or rl"),
    ("downstream.0.num_steps=x",
     "downstream.0.num_steps: Input should be a valid integer, "
     "unable to parse string as an integer (value 'x')"),
    ("model.lora.targets=[a, 2]",
     "model.lora.targets.1: Input should be a valid string (value 2); put it in quotes"),
    ("model.lora.targets=5", "model.lora.targets: Input should be a list or 'all-linear' (value 5)"),
    ("data.train.0.where={level: 5}",
     "data.train.0.where.level: Input should be a valid string (value 5); put it in quotes"),
    ("data.train.0.task=t",
     "data.train.0: give exactly one of task (a label) and task_column (a column that holds it)"),
    ("objective=[1]", "objective: Input should be fields with values (value a list of 1)"),
    ("arms.0.objective={target_kl: 0.5, beta: 0}",
     "arms.0.objective.target_kl: 0.5 is reached by steering beta, which is 0; "
     "give a beta > 0 to start from"),
    ("learner=null", "learner: Input should be fields with values (value null)"),
    ("name=" + "x" * 10_000 + "!",
     "name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$' (value '" + "x" * 59 + "...)"),
    ("seed=[1",
     "--set seed: not valid YAML: while parsing a flow sequence, expected ',' or ']', "
     "but got '<stream end>'"),
    ("seed=" + "9" * 5000,
     "--set seed: not valid YAML: Exceeds the limit (4300 digits) for integer string conversion: "
     "value has 5000 digits"),
    ("seed", "--set seed: write it as field.path=value"),
    ("a..b=1", "--set a..b=1: write it as field.path=value"),
    ("seed.x=1", "--set seed.x: seed is a value, it has no field 'x'"),
    ("arms.²=1",
     "--set arms.²: no item '²' here; choose a position or one of ['grpo', 'frpo', 'grpo-reverse', 'frpo-rev"
     "erse']"),
]  # fmt: skip


@pytest.mark.parametrize(("assignment", "message"), MISTAKES, ids=[m[0][:40] for m in MISTAKES])
def test_a_mistake_is_one_line_with_the_exact_field(assignment: str, message: str, tmp_path: Path) -> None:
    assert refusal(TESTBED.read_text(), tmp_path, assignment) == message


FILES = [
    ("", "recipe FILE: expected fields with values, found nothing; `frpo init` writes an example"),
    ("- a\n", "recipe FILE: expected fields with values, found a list of 1; `frpo init` writes an example"),
    ("name: a\nseed: 1\nname: b\n",
     "recipe FILE:3: not valid YAML: 'name' stands here and in line 1; keep one of them"),
    ("a: 1\nx: {y: 1,\n 'y': 2}\n",
     "recipe FILE:3: not valid YAML: 'y' stands here and in line 2; keep one of them"),
    ("name: x\n\tseed: 1\n",
     "recipe FILE:2: not valid YAML: while scanning for the next token, "
     "found character '\\t' that cannot start any token; indent with blanks"),
    ("name: 'x\nseed: 1\n",
     "recipe FILE:3: not valid YAML: while scanning a quoted scalar (line 1), "
     "found unexpected end of stream"),
    ("name: x\n seed: 1\n", "recipe FILE:2: not valid YAML: mapping values are not allowed here"),
    ("name: x\nseed: &a [*a]\n", "recipe FILE:2: not valid YAML: an alias stands inside what it names"),
    ("a: 1\nb: !!python/object:os.system x\n",
     "recipe FILE:2: not valid YAML: a value of kind python/object:os.system; leave the tag out"),
    ("x:\n" + " [\n" * 5000, "recipe FILE:101: not valid YAML: nested more than 100 levels deep"),
    ("x:\n" + "[" * 5000,
     "recipe FILE:2: not valid YAML: while scanning a simple key, could not find expected ':'"),
    ("---\na: 1\n---\nb: 2\n",
     "recipe FILE:3: not valid YAML: expected a single document in the stream (line 2), "
     "but found another document"),
    ("a\x00b: 1\n", "recipe FILE: not valid YAML: character 2 is no text; save it as UTF-8 text"),
    (b"name: caf\xe9\n", "recipe FILE: byte 10 is no UTF-8; save it as UTF-8 text"),
    ("name: x\n".encode("utf-16"), "recipe FILE: byte 1 is no UTF-8; save it as UTF-8 text"),
    ("# " + "x" * 300_000, "recipe FILE: more than 200,000 bytes; give a YAML file, and data by its path"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FILES, ids=[m[-40:] for _, m in FILES])
def test_a_file_that_is_no_recipe(text: str | bytes, message: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path) == message


def test_nested_aliases_are_counted_before_they_are_written_out(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for i in range(12):
        text += f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n"
    assert (
        refusal(text, tmp_path)
        == "recipe FILE:5: not valid YAML: more than 20000 values, aliases written out"
    )


def test_a_folder_a_missing_file_and_a_device(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no.yaml", "No such file"),
        (Path("/dev/zero"), "more than 200,000 bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(path)


def test_many_mistakes_are_ten_lines(tmp_path: Path) -> None:
    lines = refusal(TESTBED.read_text() + "".join(f"new{i}: 1\n" for i in range(30)), tmp_path).splitlines()
    assert (len(lines), lines[-1]) == (11, "... and 20 more")


def test_a_service_has_the_same_messages(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "rewards: [{kind: function, name: a, function: 'm:f', zzz: 1}]\nlimits: {timout_s: 3}\n"
    )
    with pytest.raises(ConfigError) as raised:
        read_section(tmp_path / "s.yaml", (), ServiceConfig)
    assert str(raised.value).splitlines() == [
        "rewards.0.zzz: unknown field (value 1); `frpo config` lists the fields",
        "limits.timout_s: unknown field (value 3); did you mean timeout_s?",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("-1E+3", -1000.0), ("1.", 1.0), (".5", 0.5), ("0", 0), ("-3", -3), ("0x1f", 31),
        ("0o17", 15), ("1_000", "1_000"),
        ("2024-01-31", "2024-01-31"), ("2024-02-30", "2024-02-30"), ("12:30", "12:30"), ("007", "007"),
        ("08", "08"), ("yes", True), ("off", False),
        ("null", None), ("~", None), ("", None), ("'1e-5'", "1e-5"), ("1e", "1e"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    value_read = tree.parse_yaml(text, "here")
    assert (type(value_read), value_read) == (type(value), value)
    assert math.isnan(tree.parse_yaml(".nan", "here"))


def test_what_is_dumped_is_read_back_here_and_by_others(tmp_path: Path) -> None:
    values = [
        "1e-5",
        "2024-01-31",
        "no",
        "007",
        "0o17",
        "12:30",
        "1_000",
        1e-5,
        1.0,
        3,
        True,
        None,
        "~",
        "a: b",
        "é",
    ]
    text = tree.dump_yaml({"v": values})
    assert tree.parse_yaml(text, "here") == {"v": values}
    assert yaml.safe_load(text) == {"v": values}
    config = load_recipe(
        TESTBED, ("learner.learning_rate=1e-5", "rewards.0.arguments={since: 2024-01-31, small: 1e-7}")
    )
    assert config.rewards[0].arguments == {"since": "2024-01-31", "small": 1e-7}  # type: ignore[union-attr]
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_recipe(tmp_path / "again.yaml") == config


def test_an_anchor_is_a_copy_and_a_merge_may_be_overridden(tmp_path: Path) -> None:
    text = TESTBED.read_text()
    start, end = text.index("arms:"), text.index("downstream:")
    shared = (
        "arms:\n"
        "  - {name: a, objective: &o {estimator: {kind: grpo}, beta: 0.1}}\n"
        "  - {name: b, objective: {<<: *o, beta: 0.2}}\n"
        "  - {name: c, objective: *o}\n"
    )
    (tmp_path / "r.yaml").write_text(text[:start] + shared + text[end:])
    arms = load_recipe(tmp_path / "r.yaml", ("arms.a.objective.beta=0.7",)).arms
    assert [a.objective.beta for a in arms] == [0.7, 0.2, 0.1]


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    sets = (
        "run_dir=~/runs/a",
        "model.path=~/m",
        "data.train.0.path=~/d.jsonl",
        "rewards.0.function=~/r.py:f",
        "harness.tasks=[~/t.yaml]",
    )
    config = load_recipe(TESTBED, sets)
    assert config.folder == Path("/home/me/runs/a")
    assert (config.model.path, config.data.train[0].path) == ("/home/me/m", "/home/me/d.jsonl")
    assert config.rewards[0].function == "/home/me/r.py:f"  # type: ignore[union-attr]
    assert config.harness is not None
    assert config.harness.tasks == ("/home/me/t.yaml",)
    assert load_recipe(TESTBED, ("run_dir=~nobody-has-this-name/x",)).folder == Path(
        "~nobody-has-this-name/x"
    )


def test_of_two_assignments_the_later_counts() -> None:
    assert load_recipe(TESTBED, ("seed=1", "seed=2")).seed == 2


RL = "downstream=[{{kind: rl, name: d, data: [{{path: a.jsonl, task: t}}]{}}}]"


def test_an_arm_inherits_the_fields_of_an_estimator_of_its_own_kind_alone() -> None:
    run = "objective.estimator={kind: frpo, lam: 0.5, jackknife: false}"
    arms = (
        "arms=[{name: as-it-is}, {name: own, objective: {estimator: {lam: 0.1}}}, {name: named, objective: "
        "{estimator: {kind: frpo, scale: unit}}}, {name: other, objective: {estimator: "
        "{kind: grpo}}}, {name: "
        "none, objective: {estimator: null}}]"
    )
    estimators = {arm.name: arm.objective.estimator for arm in load_recipe(TESTBED, (run, arms)).arms}
    assert estimators == {
        "as-it-is": FrpoEstimator(lam=0.5, jackknife=False),
        "own": FrpoEstimator(lam=0.1, jackknife=False),
        "named": FrpoEstimator(lam=0.5, jackknife=False, scale="unit"),
        "other": GrpoEstimator(),
        "none": FrpoEstimator(lam=0.5, jackknife=False),
    }
    back = "arms=[{name: a, objective: {estimator: {kind: frpo, lam: 0.1}}}, {name: b}]"
    a, b = load_recipe(TESTBED, ("objective.estimator={kind: grpo, normalize_std: true}", back)).arms
    assert a.objective.estimator == FrpoEstimator(lam=0.1)
    assert b.objective.estimator == GrpoEstimator(normalize_std=True)


def test_downstream_rl_inherits_the_learner_but_not_the_reward_to_stop_at() -> None:
    sets = ("learner.stop_at_reward=0.8", "learner.learning_rate=3e-4")
    (inherits,) = load_recipe(TESTBED, (*sets, RL.format(""))).downstream
    assert inherits.kind == "rl"
    assert (inherits.learner.stop_at_reward, inherits.learner.learning_rate, inherits.num_steps) == (
        None,
        3e-4,
        100,
    )
    (own,) = load_recipe(TESTBED, (*sets, RL.format(", learner: {stop_at_reward: 0.9}"))).downstream
    assert own.kind == "rl"
    assert own.learner.stop_at_reward == 0.9
    assert load_recipe(TESTBED, sets).arms[0].learner.stop_at_reward == 0.8


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            ", objective: {estimator: {rho: 3}}",
            "downstream.d.objective.estimator.rho: 3 is not below log k = 2.08 nats",
        ),
        (
            ", learner: {micro_batch_tokens: 16}",
            "downstream.d.learner.micro_batch_tokens: 16 is less than one sequence",
        ),
        (", learner: 5", "downstream.0.learner: Input should be fields with values (value 5)"),
    ],
)
def test_downstream_rl_is_checked_as_an_arm_is(own: str, message: str, tmp_path: Path) -> None:
    assert refusal(TESTBED.read_text(), tmp_path, RL.format(own)).startswith(message)
    if "micro" in own:
        assert "arms.grpo.learner.micro_batch_tokens: 16" in refusal(
            TESTBED.read_text(), tmp_path, "arms.grpo.learner.micro_batch_tokens=16"
        )


def test_every_number_of_the_configuration_refuses_infinity() -> None:
    assert Config.model_config["allow_inf_nan"] is False
