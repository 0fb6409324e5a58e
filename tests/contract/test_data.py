"""Data that is wrong, as a user meets it: one message with file and line before anything starts; and what
`frpo plan` says of data."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from frpo.cli import main
from frpo.config import ConfigError, DownstreamSft
from frpo.metrics import RunLog
from frpo.outline import list_stages
from frpo.outline.stage import Data
from frpo.recipe import load_recipe
from frpo.stages.folders import look_at_stages
from frpo.stages.inputs import Inputs, resolve_testbed
from frpo.stages.walk import run_stages
from tests.support.runs import options_of

ROOT = Path(__file__).parents[2]
TESTBED = str(ROOT / "recipes" / "testbed.yaml")
GOOD = b'{"prompt": "What is 1+1?", "answer": 2}\n'


def frpo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["frpo", *args])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


WRONG = {
    "cut.jsonl.gz": (gzip.compress(GOOD * 100)[:-20], "cut.jsonl.gz:27: broken gzip data"),
    "latin1.jsonl": (GOOD + '{"prompt": "café"}\n'.encode("latin-1"), "latin1.jsonl:2: byte 0xE9"),
    "deep.jsonl": (
        GOOD + b'{"prompt": "x", "a": ' + b"[" * 100000 + b"]" * 100000 + b"}\n",
        "deep.jsonl:2: lists and objects more than",
    ),
    "half.jsonl": (
        GOOD + b'{"prompt": "broken \\ud83d emoji"}\n',
        "half.jsonl:2: column 'prompt': half a character",
    ),
    "brackets.jsonl": (
        b'{"prompt": ["[/INST]", "[bold]"]}\n',
        "brackets.jsonl:1: column 'prompt': the message '[/INST]' needs role",
    ),
    "human.jsonl": (
        b'{"prompt": [{"role": "human", "content": "hi"}]}\n',
        "human.jsonl:1: column 'prompt': unknown role 'human'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_one_message_in_run_and_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, message = WRONG[name]
    (tmp_path / name).write_bytes(data)
    asked = (
        "--set",
        f"data.train=[{{path: {tmp_path / name}, task: t}}]",
        "--set",
        "data.mix={}",
        "--run-dir",
        str(tmp_path / "run"),
    )
    code, out, err = frpo(monkeypatch, capsys, "run", TESTBED, *asked)
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err
    assert not (tmp_path / "run").exists()
    _, out, err = frpo(monkeypatch, capsys, "plan", TESTBED, *asked)
    assert message in out + err  # whole, whatever is in brackets and however narrow the terminal is


def test_plan_tells_what_is_let_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        tmp_path / "train.jsonl",
        *({"prompt": f"[b]How {i}?", "task": "harmful", "answer": "a", "completions": "x"} for i in range(4)),
    )
    write(
        tmp_path / "heldout.jsonl",
        *({"prompt": f"[b]how {i}", "task": "harmful", "answer": "a"} for i in range(3, 9)),
    )
    files = [
        f"data.{part}=[{{path: {tmp_path / part}.jsonl, task_column: task}}]" for part in ("train", "heldout")
    ]
    _, out, _ = frpo(
        monkeypatch,
        capsys,
        "plan",
        TESTBED,
        *options_of((*files, "data.mix={}")),
    )
    assert f"{tmp_path}/train.jsonl:1: reward functions do not get the column completions" in out
    assert "1 of 6 held-out prompts are training prompts too" in out


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def inputs(folder: Path, *sets: str) -> tuple[Inputs, str]:
    """The inputs of the testbed's run, and what was said while they were read."""
    config = load_recipe(Path(TESTBED), sets).model_copy(update={"run_dir": folder})
    with RunLog(folder, config) as log:
        opened = Inputs(resolve_testbed(config), log)
    return opened, (folder / "run.log").read_text()


@pytest.mark.long
def test_a_run_counts_what_is_trained_and_held_out_and_refuses_too_much(tmp_path: Path) -> None:
    trained = [p.text for p in inputs(tmp_path / "own")[0].train][:3]
    assert "held-out prompts are training prompts" not in (tmp_path / "own" / "run.log").read_text()
    rows = [{"prompt": text.upper() + " ", "task": "harmful"} for text in trained]
    new = [{"prompt": f"how {'do ' * i}", "task": "harmful"} for i in range(1, 6)]
    heldout = write(tmp_path / "heldout.jsonl", *rows, *new)
    asked = f"data.heldout=[{{path: {heldout}, task_column: task}}]"
    assert (
        "data.heldout: 3 of 8 held-out prompts are training prompts too"
        in inputs(tmp_path / "some", asked)[1]
    )
    assert '"shared": 3, "heldout": 8' in (tmp_path / "some" / "metrics.jsonl").read_text()
    write(tmp_path / "heldout.jsonl", *rows, *new[:2])
    with pytest.raises(
        ConfigError,
        match=r"data.heldout: 3 of 5 held-out prompts are training prompts too .* more than the 50%",
    ):
        inputs(tmp_path / "most", asked)


def test_what_a_template_refuses_of_any_stage_comes_to_light_before_an_actor_starts(tmp_path: Path) -> None:
    examples = write(
        tmp_path / "sft.jsonl",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )
    asked = f"downstream.0.data=[{{path: {examples}, prompt: messages, task: downstream}}]"
    config = load_recipe(Path(TESTBED), (asked, "base=null")).model_copy(update={"run_dir": tmp_path / "run"})

    def never(*_: Any) -> Any:
        raise AssertionError("actors were started")

    with (
        RunLog(tmp_path / "run", config) as log,
        pytest.raises(ConfigError, match=r"sft.jsonl:1: chat messages, but the model's tokenizer"),
    ):
        run_stages(config, look_at_stages(config), log, never)


@pytest.mark.long
def test_every_stage_of_the_testbed_is_read_by_the_paths_of_its_files(tmp_path: Path) -> None:
    """A recipe calls them by name; what lies behind is written by the run."""
    config = load_recipe(Path(TESTBED), ()).model_copy(update={"run_dir": tmp_path / "run"})

    class Started(Exception):
        pass

    def start(*_: Any) -> Any:
        raise Started

    with RunLog(tmp_path / "run", config) as log, pytest.raises(Started):
        run_stages(config, look_at_stages(config), log, start)


def test_examples_of_two_fine_tunes_are_read_once_and_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _ = inputs(tmp_path)
    opened.read_ahead([s for s in list_stages(opened.config) if s.kind == "downstream"])
    monkeypatch.setattr("frpo.stages.inputs.load_examples", None)
    examples = []
    for task in opened.config.downstream:
        assert isinstance(task, DownstreamSft)
        examples.append(opened.examples(Data(task.name, task.data, task.max_tokens)))
    assert examples[0] is examples[1]
    assert [len(each) for each in examples] == [72, 72]
