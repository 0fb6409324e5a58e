"""Every file of examples/ does what it says."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from rich.console import Console

from frpo.config import JudgeReward
from frpo.explain import print_plan
from frpo.metrics import RunLog, read_steps
from frpo.outline.rlhf import Rlhf
from frpo.recipe import dump_config, load_recipe
from frpo.records import ArmSummary, Estimate, Evaluation, StageResult
from frpo.report import build_report
from frpo.rewards.loading import load_function
from frpo.rewards.template import JudgeTemplate, load_template
from frpo.stages.work import Work
from frpo.types import Item
from tests.support.builders import evaluation_of, measured_task, metrics
from tests.support.fakes import FakePrompts, team
from tests.support.fakes import config as fake_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_all_examples_are_tested_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    assert names == {
        "my_reward.py",
        "my_reward.yaml",
        "my_judge.yaml",
        "my_estimator.py",
        "my_stage.py",
        "read_a_run.ipynb",
    }


@pytest.fixture(autouse=True)
def _as_from_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(EXAMPLES)


def test_docs_and_examples_are_the_same_text() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL))
    for path in ("examples/my_reward.py", "examples/my_reward.yaml"):
        assert blocks[path] == (ROOT / path).read_text()
    assert blocks["frpo/outline/second.py"] == (EXAMPLES / "my_stage.py").read_text()
    estimator = (EXAMPLES / "my_estimator.py").read_text().partition("@dataclass")[2].partition("\n\n\n")[0]
    assert "LogMean" in estimator
    assert estimator in re.sub(r"^\+", "", page, flags=re.MULTILINE)


# ---- a judge


def test_the_judge_asks_and_scores_as_its_page_says() -> None:
    page = (ROOT / "docs" / "judges.md").read_text()
    block = re.search(r'^```yaml title="examples/my_judge.yaml"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
    assert block
    assert block[1] == (EXAMPLES / "my_judge.yaml").read_text()
    reward = JudgeReward(kind="judge", name="same", path="a/chat", template="examples/my_judge.yaml")
    template = load_template(reward)
    (message,) = template.render(Item("1 + 1?", "two", "t", {"answer": "2"}))
    assert "Question: 1 + 1?\nRight answer: 2\nGiven answer: two\n" in message["content"]  # type: ignore[index]
    assert [template.score(answer) for answer in ("same", "close", "other")] == [1.0, 0.25, 0.0]
    fields = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    assert {*JudgeTemplate.model_fields, *JudgeReward.__annotations__} - fields == {
        "kind",
        "path",
        "template",
    }


# ---- a reward


def test_the_reward_is_the_share_of_the_right_words() -> None:
    reward = load_function("examples/my_reward.py:shared_words")
    right = ("i must refuse this", "no that is not safe")
    scores = reward(
        prompts=["how?"] * 4,
        completions=["that is not safe", "i must", "", "anything"],
        answer=[right, right, right, None],
        task=["harmful"] * 4,
    )
    assert scores == [0.8, 0.5, 0.0, None]


def test_the_recipe_of_the_reward_plans() -> None:
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=120, file=nowhere)
        assert print_plan(load_recipe(EXAMPLES / "my_reward.yaml"), console)
    words = console.export_text()
    assert "rlhf/frpo │ 100     │ 19,200" in words
    assert "Nothing is missing." in words


# ---- an estimator


def test_the_estimator_weighs_a_rare_success_more() -> None:
    advantages = importlib.import_module("my_estimator").compare_estimators(
        [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0] * 4]
    )
    third = 1 / 3
    expected = torch.tensor([[3.0, -1, -1, -1], [third, third, third, -1], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(advantages["log mean"], expected)
    assert advantages["GRPO"][0].tolist() == [0.75, -0.25, -0.25, -0.25]


# ---- a stage


def test_the_stage_goes_on_from_the_arms_policy(tmp_path: Path) -> None:
    recipe = fake_config(beta=0.05).model_copy(update={"run_dir": tmp_path})
    prompts = FakePrompts(6).take(0)
    inputs: Any = SimpleNamespace(train=prompts, heldout=prompts)
    second = importlib.import_module("my_stage").Second(recipe.arms[0], num_steps=3)
    with RunLog(tmp_path, recipe) as log:
        work = Work(recipe, team(recipe, (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)), log, inputs)
        first, last = (stage.do(work) for stage in (Rlhf(recipe.arms[0]), second))
    assert [row.step for row in read_steps(tmp_path, "second/arm")] == [1, 2, 3]
    assert (last.stage, last.evaluations[0].downstream) == ("second/arm", "second round")
    assert last.evaluations[0].rewards[0].reward.mean > first.evaluations[0].rewards[0].reward.mean - 0.05
    assert (tmp_path / "second" / "arm" / "policy").is_dir()


# ---- a run, read from a notebook


def make_evaluation(arm: str, harmful: float, downstream: str | None = None) -> Evaluation:
    rewards = [
        measured_task(task, mean, per_prompt=(mean, mean))
        for task, mean in (("harmful", harmful), ("harmless", 0.8))
    ]
    return evaluation_of(arm, *rewards, downstream=downstream, kl_reference=Estimate(mean=0.5, se=0.01))


def summary_of(arm: str) -> ArmSummary:
    return ArmSummary(
        arm=arm,
        num_steps=3,
        num_prompts=72,
        num_completions=576,
        num_tokens=2880,
        failed_rewards=0,
        seconds=1.5,
        phase_seconds={"generate": 1.0},
        weights_sha256="ab",
    )


@pytest.fixture
def made_run(tmp_path: Path) -> Path:
    """Two arms of three steps, one fine-tune of each, and the report."""
    config = load_recipe(
        ROOT / "recipes" / "testbed.yaml",
        ("arms=[{name: grpo, objective: {estimator: {kind: grpo}}}, {name: frpo}]",),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "versions.json").write_text("{}")
    kept = {"grpo": 0.5, "frpo": 0.7}
    results = [StageResult(stage="base", seconds=1.0, evaluations=(make_evaluation("base", 0.6),))]
    with RunLog(tmp_path, config) as log:
        for arm, after in kept.items():
            log.begin(f"rlhf/{arm}", 3)
            for step in (1, 2, 3):
                log.step(
                    f"rlhf/{arm}",
                    metrics(step, reward=step / 10, kl=step / 100, reward_tasks={"harmful": 0.5}),
                )
            before = make_evaluation(arm, 0.9)
            results.append(
                StageResult(stage=f"rlhf/{arm}", seconds=1.0, evaluations=(before,), arm=summary_of(arm))
            )
            tuned = tuple(make_evaluation(arm, mean, "crafts-harsh") for mean in (0.9, after))
            results.append(
                StageResult(stage=f"downstream/{arm}/crafts-harsh", seconds=1.0, evaluations=tuned)
            )
    for result in results:
        (tmp_path / result.stage).mkdir(parents=True)
        (tmp_path / result.stage / "done.json").write_text(result.model_dump_json())
    build_report(tmp_path)
    return tmp_path


def test_the_notebook_reads_a_run(
    made_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib.use("Agg")
    monkeypatch.setenv("RUN", str(made_run))
    notebook = json.loads((EXAMPLES / "read_a_run.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "rlhf/frpo: 3 steps in 2 s, reward 0.300" in printed
    assert "downstream/frpo/crafts-harsh, harmful: 0.900 -> 0.700" in printed
    assert {key: after.mean for key, after in names["kept"].items()} == {
        ("grpo", "crafts-harsh"): 0.5,
        ("frpo", "crafts-harsh"): 0.7,
    }
    assert names["over_kl"].lines[0].get_xdata().tolist() == [0.01, 0.02, 0.03]
