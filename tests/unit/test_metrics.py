"""metrics.jsonl survives crashes and holds each step once; numbers reach every board."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from frpo.advice import advise
from frpo.boards import Tracker, name_metric, tell_config
from frpo.config import Config, ConfigError, Missing
from frpo.metrics import LONGEST_SAMPLE, METRICS, SAMPLES, RunLog, numbers_of, read_rows, read_steps
from frpo.preflight import check_trackers
from frpo.records import Evaluation, Sample, to_json
from frpo.rows import append_rows
from frpo.stats import BatchStats, FinetuneStats, GateStats, Phases, Times, UpdateStats
from frpo.types import Completion, Group, Prompt, Reward, ScoredGroup
from tests.support.builders import BATCH, PHASES, UPDATE, metrics
from tests.support.fakes import config as fake_config

IDS = np.zeros(1, np.int32)
ZEROS = np.zeros(1, np.float32)


@pytest.fixture
def cfg() -> Config:
    return fake_config()


def test_steps_that_are_done_again_appear_once(tmp_path: Path, cfg: Config) -> None:
    with RunLog(tmp_path, cfg) as log:
        log.begin("rlhf/arm", 10)
        log.begin("rlhf/other", 10)
        for step in range(1, 6):
            log.step("rlhf/arm", metrics(step, reward=0.1))
            log.step("rlhf/other", metrics(step))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "stage": "rlhf/arm", "st')  # SIGKILL in the middle of a line
    with RunLog(tmp_path, cfg) as log:
        log.begin("rlhf/arm", 10, start=3)
        for step in range(4, 8):
            log.step("rlhf/arm", metrics(step, reward=0.9))
    assert [(r.step, r.batch.reward) for r in read_steps(tmp_path, "rlhf/arm")] == [
        (s, 0.1 if s <= 3 else 0.9) for s in range(1, 8)
    ]
    assert [r.step for r in read_steps(tmp_path, "rlhf/other")] == [1, 2, 3, 4, 5]
    assert read_steps(tmp_path, "rlhf/arm")[0] == metrics(1, reward=0.1)


def test_plain_lines_without_a_terminal(
    tmp_path: Path, cfg: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, cfg) as log:
        with log.waiting("starting Ray"):
            pass
        log.begin("rlhf/arm", 2)
        log.step("rlhf/arm", metrics(1))
        log.step("rlhf/arm", metrics(2))
        log.end("rlhf/arm")
    out = capsys.readouterr().out
    assert "starting Ray ..." in out
    assert "rlhf/arm step 1/2: reward 0.500  KL 0.300  entropy 1.10  80 tokens/s" in out
    assert "rlhf/arm step 2/2" in out
    assert "rlhf/arm step 2/2" in (tmp_path / "run.log").read_text()


def test_tensorboard_holds_the_numbers(tmp_path: Path, cfg: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, cfg) as log:
        log.begin("downstream/arm/task", 2)
        log.finetune_step("downstream/arm/task", 1, FinetuneStats(0.75, 1.0, 1e-3, 100, 0.5))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "downstream_arm_task")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.75)]
    (row,) = [r for r in read_rows(tmp_path) if r["kind"] == "finetune"]
    assert (row["loss"], row["stage"], row["step"]) == (0.75, "downstream/arm/task", 1)


def test_files_hold_null_in_place_of_nan_and_infinity(tmp_path: Path, cfg: Config) -> None:
    sample = Sample(task="t", prompt="how?", completion="so", reward=None)
    measured = Evaluation(
        arm="arm",
        downstream=None,
        step=0,
        rewards=(),
        kl_reference=None,
        kl_policy=None,
        downstream_loss=None,
        length=2.0,
        cut_share=0.0,
        samples=(sample,),
        seconds=1.0,
    )
    odd = metrics(1, kl=float("nan"), radius=float("inf"), reward_parts={"a": float("-inf"), "b": 1.0})
    with RunLog(tmp_path, cfg) as log:
        log.begin("rlhf/arm", 2)
        log.step("rlhf/arm", odd)
        log.evaluation("rlhf/arm", measured, step=1)
        log.begin("rlhf/arm", 2, start=1)  # writes the rows again
    for line in [
        *(tmp_path / METRICS).read_text().splitlines(),
        *(tmp_path / SAMPLES).read_text().splitlines(),
    ]:
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"a file holds {constant}"))
    (row,) = read_steps(tmp_path, "rlhf/arm")
    assert (row.update.kl, row.batch.radius, row.batch.reward_parts) == (None, None, {"a": None, "b": 1.0})
    assert advise([row], 7) == []


def test_to_json() -> None:
    assert (
        to_json({"a": float("nan"), "b": [1.0, float("inf"), "x"], "c": {"d": (None, -0.5)}})
        == '{"a": null, "b": [1.0, null, "x"], "c": {"d": [null, -0.5]}}'
    )


def test_what_teaches_little_is_said_once_even_over_a_resume(
    tmp_path: Path, cfg: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    equal = [metrics(step, equal_groups=1.0) for step in range(1, 7)]
    with RunLog(tmp_path, cfg) as log:
        log.begin("rlhf/arm", 6)
        for row in equal[:4]:
            log.step("rlhf/arm", row)
    with RunLog(tmp_path, cfg) as log:
        log.begin("rlhf/arm", 6, start=4)
        for row in equal[4:]:
            log.step("rlhf/arm", row)
    said = [line for line in capsys.readouterr().out.splitlines() if "equal rewards" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "rlhf/arm step 3: all 4 groups had equal rewards for 3 steps: no gradient comes from them; use harder"
    )


def test_every_number_of_a_step_reaches_the_boards_by_its_own_name() -> None:
    numbers = numbers_of(metrics(3, kl=None, radius=None))
    records = (BatchStats, GateStats, UpdateStats, Phases, Times)
    names = [field.name for field in chain.from_iterable(map(fields, records))]
    assert len(set(names)) == len(names)  # no two records share one
    several = {"gate", "reward_parts", "reward_tasks", "errors", "drawn"}
    expected = {*names, "policy_version", "published_bytes"} - several - {"kl", "radius"}
    assert set(numbers) == expected | {"reward_parts/a", "reward_tasks/t"}
    assert numbers["reward"] == BATCH.reward
    assert numbers["loss"] == UPDATE.loss
    assert numbers["publish_s"] == PHASES.publish_s
    assert numbers["reward_parts/a"] == 0.52


def test_a_task_of_any_name_has_a_metric() -> None:
    names = ("step_s", "reward_tasks/two words", "reward_parts/is-it.safe?", "reward_tasks/\u00e9t\u00e9:1")
    assert [name_metric(name) for name in names] == [
        "frpo_step_s",
        "frpo_reward_tasks_two_words",
        "frpo_reward_parts_is_it_safe_",
        "frpo_reward_tasks__t__1",
    ]


def test_trackers_are_told_no_secret(cfg: Config) -> None:
    arguments = {"api_key": "sk-1", "api_key_env": "KEY", "headers": {"authorization": "Bearer sk-2"}}
    reward = {"kind": "function", "name": "f", "function": "m:f", "arguments": arguments}
    asked = Config.model_validate({**cfg.model_dump(mode="json"), "rewards": [reward]})
    (told,) = tell_config(asked)["rewards"]
    assert told["arguments"] == {
        "api_key": "left-out",
        "api_key_env": "KEY",
        "headers": {"authorization": "left-out"},
    }
    kept = {**tell_config(asked), "rewards": None}
    assert kept == {**asked.model_dump(mode="json"), "rewards": None}


def test_a_terminal_gets_a_bar_with_what_was_measured(tmp_path: Path, cfg: Config) -> None:
    screen = io.StringIO()
    with RunLog(tmp_path, cfg) as log:
        log.console, log.rich = Console(file=screen, force_terminal=True, width=160, highlight=False), True
        with log.waiting("placing the actors"):
            pass
        log.begin("rlhf/arm", 2)
        log.step("rlhf/arm", metrics(1))
        log.note("a word in between")
        log.step("rlhf/arm", metrics(2))
        log.end("rlhf/arm")
    shown = screen.getvalue()
    assert re.search(r"placing the actors: \d+\.\d s", shown)
    assert "a word in between" in shown
    assert "2/2" in shown
    assert "reward 0.500  KL 0.300" in shown
    assert "rlhf/arm: done in" in shown


def test_samples_are_kept_for_people(tmp_path: Path, cfg: Config) -> None:
    measured = Evaluation(
        arm="arm",
        downstream=None,
        step=0,
        rewards=(),
        kl_reference=None,
        kl_policy=None,
        downstream_loss=None,
        length=2.0,
        cut_share=0.0,
        samples=(Sample(task="t", prompt="how?", completion="like so", reward=1.0),),
        seconds=1.0,
    )
    with RunLog(tmp_path, cfg) as log:
        log.evaluation("rlhf/arm", measured, step=3, kind="validation")
    (row,) = [json.loads(line) for line in (tmp_path / SAMPLES).read_text().splitlines()]
    assert (row["stage"], row["step"], row["prompt"], row["completion"]) == ("rlhf/arm", 3, "how?", "like so")
    assert row["kind"] == "validation"


def test_the_best_and_the_worst_of_a_group_are_kept(tmp_path: Path, cfg: Config) -> None:
    texts = ("so so", "good" * 1000, "bad", "lost")
    completions = [Completion(IDS, ZEROS, IDS, text, "stop") for text in texts]
    prompt = Prompt("p:1", "how?", IDS, "t", {})
    rewards = [Reward(total, {}) for total in (0.5, 0.9, 0.1, None)]
    lost = [Reward(None, {}, "no judge")] * 4
    with RunLog(tmp_path, cfg) as log:
        log.begin("rlhf/arm", 9)
        log.drawn("rlhf/arm", 3, ScoredGroup(Group(0, prompt, tuple(completions)), tuple(rewards), None))
        log.drawn("rlhf/arm", 4, ScoredGroup(Group(0, prompt, tuple(completions)), tuple(lost), None))
        rows = list(read_rows(tmp_path, SAMPLES))
        log.begin("rlhf/arm", 9, start=3)  # a resume draws step 4 again
        assert list(read_rows(tmp_path, SAMPLES)) == rows[:2]
    assert [(row["kind"], row["step"], row["completion"], row["reward"]) for row in rows] == [
        ("drawn", 3, ("good" * 1000)[:LONGEST_SAMPLE], 0.9),
        ("drawn", 3, "bad", 0.1),
        ("drawn", 4, "so so", None),
    ]
    assert {(row["stage"], row["task"], row["prompt"]) for row in rows} == {("rlhf/arm", "t", "how?")}


@pytest.mark.long
def test_wandb_gets_the_numbers_when_asked(
    tmp_path: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the real library, offline: it writes the run's history to a file that a later `wandb sync` sends."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with RunLog(tmp_path, cfg.model_copy(update={"wandb_project": "frpo-test"})) as log:
        log.begin("rlhf/arm", 2)
        log.step("rlhf/arm", metrics(1, reward=0.25))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # its writer is a process of its own, which a busy machine makes late
    while not (
        b"rlhf/arm/reward" in (history := file.read_bytes()) and b"0.25" in history
    ):  # protobuf, strings as they are
        assert time.monotonic() < deadline, "the numbers did not reach the file"
        time.sleep(0.2)


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb_and_a_superseded_one_does_not(
    tmp_path: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []

    class Run:
        def log(self, values: object) -> None: ...
        def finish(self) -> None: ...

    def init(*, id: str, resume: str, **_: object) -> Run:
        assert resume == "allow"
        ids.append(id)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for turn in range(3):
        with RunLog(tmp_path, cfg.model_copy(update={"wandb_project": "frpo-test"})) as log:
            log.begin("rlhf/arm", 2)
            log.step("rlhf/arm", metrics(1))
            if turn == 1:
                log.put_aside(["rlhf/arm"], [], tmp_path / "superseded" / "now")
    assert ids[0] == ids[1] != ids[2]
    assert (tmp_path / "superseded" / "now" / "wandb.id").read_text() == ids[0]


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real library's client on a store of files, which it has to be allowed."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return mlflow.MlflowClient()


def mlflow_runs(client: Any, experiment: str) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


@pytest.mark.long
def test_mlflow_gets_the_numbers_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path, cfg: Config, mlflow_store: Any
) -> None:
    asked = cfg.model_copy(update={"mlflow_experiment": "frpo-test"})
    for step in (1, 2):
        with RunLog(tmp_path / "run", asked) as log:
            log.begin("rlhf/arm", 2, start=step - 1)
            log.step("rlhf/arm", metrics(step, reward=step / 4))
    (run,) = mlflow_runs(mlflow_store, "frpo-test")
    history = mlflow_store.get_metric_history(run.info.run_id, "rlhf/arm/reward")
    assert [(each.step, each.value) for each in history] == [(1, 0.25), (2, 0.5)]
    assert (run.info.run_name, run.info.status) == ("fake", "FINISHED")
    assert run.data.params["arms.arm.learner.num_steps"] == "30"
    assert (tmp_path / "run" / "mlflow.id").read_text() == run.info.run_id


@pytest.mark.long
def test_a_superseded_run_and_a_store_that_does_not_know_it_begin_anew(
    tmp_path: Path, cfg: Config, mlflow_store: Any
) -> None:
    asked = cfg.model_copy(update={"mlflow_experiment": "frpo-test"})
    for turn in range(3):
        with RunLog(tmp_path / "run", asked) as log:
            log.begin("rlhf/arm", 2)
            log.step("rlhf/arm", metrics(1))
            if turn == 0:
                log.put_aside(["rlhf/arm"], [], tmp_path / "run" / "superseded" / "now")
        if turn == 1:
            (tmp_path / "run" / "mlflow.id").write_text("0" * 32)
    assert len(mlflow_runs(mlflow_store, "frpo-test")) == 3


class Refusing:
    """A tracker whose server takes one number and closes."""

    def __init__(self) -> None:
        self.taken = 0

    def add(self, *_: object) -> None:
        if self.taken:
            raise ConnectionError("the server is gone")
        self.taken += 1

    def close(self) -> None:
        raise AssertionError("it was lost before")


def test_a_tracker_that_is_lost_is_named_once_and_the_run_goes_on(tmp_path: Path, cfg: Config) -> None:
    said: list[str] = []
    refusing = Refusing()
    with RunLog(tmp_path, cfg) as log:
        log.boards = [Tracker("MLflow", lambda: refusing, said.append)]
        log.begin("rlhf/arm", 4)
        for step in (1, 2, 3):
            log.step("rlhf/arm", metrics(step))
    assert said == [
        "MLflow takes no more numbers (ConnectionError: the server is gone); metrics.jsonl has all of them"
    ]
    assert [row.step for row in read_steps(tmp_path, "rlhf/arm")] == [1, 2, 3]


def test_a_tracker_that_this_machine_lacks_is_said_before_anything_starts(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    absent: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else name)
    asked = cfg.model_copy(update={"mlflow_experiment": "e"})
    with pytest.raises(
        Missing, match="mlflow_experiment: MLFLOW_TRACKING_URI is not set; export the address"
    ):
        check_trackers(asked)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    check_trackers(asked)
    absent.update(("mlflow", "wandb"))
    check_trackers(cfg)
    with pytest.raises(
        Missing, match=r"mlflow_experiment: mlflow is not installed; pip install 'frpo\[track"
    ):
        check_trackers(asked)
    with pytest.raises(Missing, match="wandb_project: wandb is not installed"):
        check_trackers(cfg.model_copy(update={"wandb_project": "p"}))


@pytest.mark.long
def test_curves_of_steps_that_are_done_again_show_once(tmp_path: Path, cfg: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, reward in ((1, 0.1), (3, 0.9)):
        with RunLog(tmp_path, cfg) as log:
            log.begin("rlhf/arm", 5, start=first - 1)
            for step in range(first, first + 3):
                log.step("rlhf/arm", metrics(step, reward=reward))
        time.sleep(1.1)  # event files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rlhf_arm")).Reload()
    assert [(e.step, round(e.value, 1)) for e in events.Scalars("reward")] == [
        (1, 0.1),
        (2, 0.1),
        (3, 0.9),
        (4, 0.9),
        (5, 0.9),
    ]


def test_samples_of_steps_that_are_done_again_appear_once(tmp_path: Path, cfg: Config) -> None:
    rows = [{"stage": "rlhf/arm", "step": step, "prompt": "é"} for step in (2, 4, 6)]
    (tmp_path / SAMPLES).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    with RunLog(tmp_path, cfg) as log:
        log.begin("rlhf/arm", 10, start=4)
    assert list(read_rows(tmp_path, SAMPLES)) == rows[:2]
    assert "é" in (tmp_path / SAMPLES).read_text()


@pytest.mark.parametrize("lacking", ["times", "batch"])
def test_rows_of_another_version_are_refused_by_their_file(tmp_path: Path, lacking: str) -> None:
    row = {"kind": "step", "stage": "rlhf/arm", **asdict(metrics(3))}
    append_rows(tmp_path, "metrics.jsonl", [row])
    assert read_steps(tmp_path, "rlhf/arm") == [metrics(3)]
    del row[lacking]
    append_rows(tmp_path, "metrics.jsonl", [row])
    message = rf"metrics.jsonl: another version .*KeyError: '{lacking}'.* --run-dir"
    with pytest.raises(ConfigError, match=message):
        read_steps(tmp_path, "rlhf/arm")
