"""Tasks of lm-evaluation-harness: what a recipe may name, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from frpo.actors.harness import scores_of
from frpo.config import ConfigError, FunctionReward, HarnessConfig, Missing
from frpo.harness import check_files, load_tasks
from frpo.preflight import check_extra
from frpo.recipe import load_recipe
from frpo.records import BenchmarkScore
from tests.support.harness import TASK


def test_a_task_file_with_local_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    (tmp_path / "mine.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    tasks, _ = load_tasks(HarnessConfig(tasks=(str(tmp_path / "mine.yaml"),)))
    assert [t["task"] for t in tasks if isinstance(t, dict)] == ["mine"]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("nowhere.yaml", None, "no such file nowhere.yaml"),
        (
            "{}/mine.yaml",
            TASK % "gone.jsonl",
            "reads gone.jsonl, which is not there; mend dataset_kwargs.data_files",
        ),
        ("{}/mine.yaml", "tsk: mine", "names no task; it needs a field 'task'"),
        pytest.param(
            "gsm9k", None, "has no task 'gsm9k'; `lm-eval ls tasks` lists them", marks=pytest.mark.long
        ),
    ],
)
def test_mistakes(task: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_tasks(HarnessConfig(tasks=(task.format(tmp_path),)))
    assert str(error.value).startswith("harness.tasks.0: ")
    assert message in str(error.value)


def test_scores_are_every_number_but_the_standard_errors() -> None:
    row = {
        "alias": "t",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": "N/A",
    }
    scores = list(scores_of({"results": {"t": row}, "n-samples": {"t": {"original": 40, "effective": 8}}}))
    assert scores == [
        BenchmarkScore(task="t", metric="acc", filter="none", value=0.5, se=0.1, num_examples=8),
        BenchmarkScore(task="t", metric="exact_match", filter="strict", value=0.25, se=None, num_examples=8),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "harness.tasks.1: no such file"),
        ("task: [", "cannot be read"),
        ("- task", "holds no fields"),
        ("metric_list: []", "names no task; it needs a field 'task'"),
        ("task: t\ndataset_kwargs: {data_files: nowhere.jsonl}", "reads nowhere.jsonl, which is not there"),
        (
            "task: t\ndataset_kwargs: {data_files: {test: [nowhere.jsonl]}}",
            "reads nowhere.jsonl, which is not there",
        ),
    ],
)
def test_a_task_file_is_looked_at_before_anything_starts(
    text: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "task.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"harness\.tasks\.1: ") as raised:
        check_files(HarnessConfig(tasks=("gsm8k", str(file))))
    assert message in str(raised.value)


def test_what_the_extra_brings_is_missed_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else name)
    plain = load_recipe(Path("testbed"))
    boxed = FunctionReward(kind="function", name="maths", function="frpo.rewards:boxed_math")
    maths = plain.model_copy(update={"rewards": (boxed,)})
    benchmarks = plain.model_copy(update={"harness": HarnessConfig(tasks=("gsm8k",))})
    for asked in (maths, benchmarks):
        check_extra(asked)
    absent.update(("lm_eval", "math_verify"))
    check_extra(plain)
    with pytest.raises(Missing, match=r"^rewards\.0\.function: math-verify is not installed; pip install"):
        check_extra(maths)
    with pytest.raises(Missing, match=r"^harness: lm-evaluation-harness is not installed; pip install 'frpo"):
        check_extra(benchmarks)
