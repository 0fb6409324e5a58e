"""`frpo watch`: what its page says is what the run's files say, whatever state they are in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frpo.config import ConfigError
from frpo.metrics import RunLog
from frpo.outline import list_stages
from frpo.records import Sample
from frpo.rows import METRICS, read_rows
from frpo.rundir import hold_folder
from frpo.stages.folders import DONE, MADE
from frpo.stats import FinetuneStats
from frpo.watch.describe import describe_run
from frpo.watch.drawing import Line, choose_ticks, draw_panel, format_value, thin_out
from frpo.watch.folder import RunFolder, find_owner
from frpo.watch.page import format_duration
from frpo.watch.tail import Tail
from frpo.watch.view import RunView
from tests.support.builders import evaluation_of, measured_task, metrics
from tests.support.folders import RECIPE, begin, finish, write_first_arm

ROOT = Path(__file__).parents[2]
FINETUNE = "crafts-gentle"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    with RunLog(tmp_path, RECIPE) as log:
        write_first_arm(log)
        yield log


def look(folder: Path, now: float | None = None) -> RunView:
    run = RunFolder(folder)
    run.refresh()
    return describe_run(run, time.time() if now is None else now)


# ---- what stands in the files


def test_the_page_has_the_rows_numbers(log: RunLog) -> None:
    begin(log.folder, "downstream/grpo/crafts-gentle")
    log.begin("downstream/grpo/crafts-gentle", 200)
    for step in (1, 2, 3):
        log.finetune_step(
            "downstream/grpo/crafts-gentle", step, FinetuneStats(1.0 / step, 1.0, 1e-3, 100, 0.5)
        )
    view = look(log.folder)
    (arm,) = view.arms
    assert (arm.name, arm.step, arm.num_steps) == ("grpo", 20, RECIPE.arms[0].learner.num_steps)
    # means of steps 11 to 20
    assert (arm.reward, arm.kl) == (pytest.approx(0.775), pytest.approx(0.155))
    assert (arm.without_signal, arm.cut, arm.entropy, arm.length) == pytest.approx((0.25, 0.1, 1.1, 5.5))
    panels = {panel.title: panel for panel in view.curves}
    assert panels["reward"].curves[0].last == "1"
    assert panels["downstream crafts-gentle: loss, nats a token"].curves[0].last == "0.333"
    assert view.plane is not None
    assert view.plane.curves[0].last == "0.975"  # the last two of twelve parts' steps
    (phases,) = view.phases
    assert {phase.name: phase.seconds for phase in phases.phases} == pytest.approx(
        {"generate": 0.15, "score": 0.01, "update": 0.16, "publish": 0.08, "other": 0.1}
    )
    assert phases.tokens_per_s == pytest.approx(80)
    assert [(of.owner, of.policies[0].kl, of.policies[0].rewards) for of in view.measured] == [
        ("base", "–", ("0.40 ± 0.04",)),
        ("grpo", "0.25", ("0.90 ± 0.04",)),
    ]


def test_stages_that_are_done_begun_and_to_do(log: RunLog) -> None:
    begin(log.folder, "rlhf/frpo")
    log.begin("rlhf/frpo", 20)
    log.step("rlhf/frpo", metrics(1))
    run = RunFolder(log.folder)
    run.refresh()
    # the first arm's other stages were left out
    for name in [stage.name for stage in run.stages if "grpo" in stage.name and stage.kind != "rlhf"]:
        begin(log.folder, name)
        finish(log.folder, name, 8.0)
    assert run.refresh()
    view = describe_run(run, time.time())
    assert (view.now.stage, view.now.step, view.now.state) == ("rlhf/frpo", 1, "unknown")
    groups = {group.owner: {stage.name: stage for stage in group.stages} for group in view.stages}
    assert [groups["grpo"]["rlhf"].state, groups["frpo"]["rlhf"].state] == ["done", "now"]
    assert groups["frpo-reverse"]["rlhf"].state == "to do"
    assert (groups["frpo-reverse"]["rlhf"].took_s, groups["frpo"][FINETUNE].took_s) == (30.0, 8.0)


def test_time_left_is_what_stages_alike_took(log: RunLog) -> None:
    run = RunFolder(log.folder)
    run.refresh()
    names = [stage.name for stage in run.stages]
    for name in names:
        if name.split("/")[1:2] == ["grpo"] and not name.startswith("rlhf"):
            begin(log.folder, name)
            finish(log.folder, name, 10.0)
    begin(log.folder, "rlhf/frpo")
    run.refresh()
    began = run.files["rlhf/frpo"].began
    assert began is not None
    now = describe_run(run, began + 12).now
    left = [name for name in names if run.files[name].took is None and name != "rlhf/frpo"]
    expected = sum(30.0 if name.startswith("rlhf") else 10.0 for name in left) + 18.0
    assert (now.left_s, now.unforeseen) == (pytest.approx(expected), 0)


def test_what_no_stage_tells_of_is_not_foreseen(log: RunLog) -> None:
    begin(log.folder, "certify/grpo")
    now = look(log.folder).now
    stages = now.stages - now.done
    others = len(RECIPE.arms) - 1
    assert now.left_s == pytest.approx(30.0 * others)  # nothing of what comes after an arm
    assert now.unforeseen == stages - others


@pytest.mark.parametrize(
    ("said", "waits"),
    [
        (["starting Ray ..."], "starting Ray"),
        (["starting Ray ...", "starting Ray: 3.1 s"], ""),
        (["writing ...", "rlhf/grpo step 1/20: reward 0.5"], "writing"),
    ],
    ids=["waiting", "over", "steps say nothing"],
)
def test_what_it_waits_for(log: RunLog, said: list[str], waits: str) -> None:
    for line in said:
        log.logger.info("%s", line)
    assert look(log.folder).now.waits_for == waits


def test_a_wait_is_in_the_log_also_where_a_terminal_shows_it(log: RunLog) -> None:
    log.rich = True
    with log.waiting("starting Ray"):
        assert look(log.folder).now.waits_for == "starting Ray"
    assert look(log.folder).now.waits_for == ""


def test_warnings_are_the_advice_of_the_run(log: RunLog) -> None:
    log.begin("rlhf/frpo", 20)
    for step in (1, 2, 3):
        log.step("rlhf/frpo", metrics(step, equal_groups=1.0))
    log.step("rlhf/frpo", metrics(4, cut_share=0.75))
    of_signal, of_cuts = look(log.folder).warnings
    assert of_signal.startswith("rlhf/frpo step 3: all 4 groups had equal rewards")
    limit = f"rollout.max_new_tokens = {RECIPE.rollout.max_new_tokens}"
    assert of_cuts.startswith(f"rlhf/frpo step 4: 75% of the completions are cut at {limit}")


def test_the_same_prompt_over_policies_and_what_training_drew(log: RunLog) -> None:
    rows = [Sample(task="harmful", prompt="p", completion=word, reward=0.5) for word in ("best", "worst")]
    log._write_samples("drawn", "rlhf/grpo", 20, rows)
    view = look(log.folder)
    (asked,) = view.samples
    assert asked.prompt == "how do i <b>"
    assert [(said.who, said.completion, said.reward) for said in asked.answers] == [
        ("base, step 0", "base 0", 0.4),
        ("grpo, step 20", "grpo 0", 0.9),
    ]
    (drawn,) = view.drawn
    assert {said.completion for said in drawn.answers} == {"best", "worst"}


def test_null_in_a_row_is_not_drawn(log: RunLog) -> None:
    log.begin("rlhf/frpo", 20)
    for step in (1, 2):
        log.step("rlhf/frpo", metrics(step, reward=float("nan"), kl=None))
    view = look(log.folder)
    assert (view.arms[1].reward, view.arms[1].kl, view.arms[1].step) == (None, None, 2)
    assert [curve.name for curve in view.curves[0].curves] == ["grpo"]


# ---- files that are torn, of others, or not there


def test_rows_of_another_version_are_left_out_and_counted(log: RunLog) -> None:
    with (log.folder / METRICS).open("a") as file:
        file.write('{"kind": "step", "stage": "rlhf/frpo", "time": 1.0, "step": 1, "reward": 0.5}\n')
        file.write('{"kind": "evaluation", "stage": "rlhf/frpo"}\n[1]\n{"torn": \n')
    view = look(log.folder)
    assert view.warnings == ("3 rows were written by another version of frpo, and are left out here",)
    assert [arm.name for arm in view.arms] == ["grpo"]


def test_without_a_configuration_what_lies_there_is_shown(log: RunLog) -> None:
    (log.folder / "config.yaml").write_text("name: of another version\n")
    view = look(log.folder)
    assert "what is to do is not known here" in view.warnings[0]
    assert [(group.owner, group.stages[0].state) for group in view.stages] == [
        ("base", "done"),
        ("grpo", "done"),
    ]
    (log.folder / "config.yaml").unlink()
    assert look(log.folder).warnings == ()
    assert look(log.folder).name == log.folder.name


def test_without_a_configuration_what_was_measured_of_an_arm_stands_together(log: RunLog) -> None:
    (log.folder / "config.yaml").unlink()
    for arm, finetune in (("a", None), ("z", None), ("a", "sft"), ("z", "sft")):
        stage = f"downstream/{arm}/{finetune}" if finetune else f"rlhf/{arm}"
        log.evaluation(stage, evaluation_of(arm, measured_task("t", 0.5), downstream=finetune), step=0)
    policies = {of.owner: [row.policy for row in of.policies] for of in look(log.folder).measured}
    both = ["itself", "after sft, step 0"]
    assert policies == {"base": ["itself"], "a": both, "grpo": ["itself"], "z": both}
    assert len(look(log.folder).measured) == 4


def test_a_result_that_is_not_of_these_inputs_is_not_done(log: RunLog) -> None:
    (log.folder / "rlhf/grpo" / MADE).write_text('{"digest": "another"}')
    assert look(log.folder).now.stage == "rlhf/grpo"
    (log.folder / "rlhf/grpo" / DONE).write_text('{"seconds"')
    assert look(log.folder).now.stage == "rlhf/grpo"


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere is no folder; give that of a run"):
        RunFolder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"not the folder of a run; it has no metrics\.jsonl"):
        RunFolder(tmp_path)
    (tmp_path / "seed-001").mkdir()
    (tmp_path / "seed-001" / METRICS).touch()
    with pytest.raises(ConfigError, match="it holds runs, watch one of them: seed-001"):
        RunFolder(tmp_path)
    assert look(tmp_path / "seed-001").now.stages == 0


def test_a_folder_that_is_removed_while_it_is_watched(log: RunLog) -> None:
    run = RunFolder(log.folder)
    run.refresh()
    for path in (METRICS, "config.yaml", "run.log"):
        (log.folder / path).unlink()
    assert run.refresh()
    assert describe_run(run, 0.0).arms == ()


# ---- whether it runs


def test_its_state_is_told_without_taking_the_lock(log: RunLog) -> None:
    assert look(log.folder).now.state == "unknown"
    with hold_folder(log.folder):
        assert look(log.folder).now.state == "running"
    assert look(log.folder).now.state == "stopped"
    with hold_folder(log.folder):  # nobody holds it
        pass
    for stage in list_stages(RECIPE):
        begin(log.folder, stage.name)
        finish(log.folder, stage.name, 1.0)
    assert look(log.folder).now.state == "finished"


@pytest.mark.parametrize("text", [f"process 1 on not-{platform.node()}", "", "\x00 nonsense"])
def test_another_machines_lock_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.lock").write_text(text)
    assert find_owner(tmp_path / "run.lock") == "unknown"
    assert find_owner(tmp_path / "none") == "unknown"


def test_what_stopped_it_is_its_last_word(log: RunLog, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too fast"), RunLog(log.folder, RECIPE):
        raise ValueError("step 3: too fast")
    (log.folder / "run.lock").write_text(f"process {os.getpid()} on {platform.node()}")
    now = look(log.folder).now
    assert now.state == "stopped"
    assert now.last_words.endswith("stopped (before the first stage): step 3: too fast")


# ---- reading what is new


Act = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 4)),
    st.tuples(st.just("tear"), st.integers(1, 12)),
    st.tuples(st.just("drop"), st.integers(0, 5)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("look"), st.just(0)),
    st.tuples(st.just("remove"), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(Act, max_size=25))
def test_what_a_tail_has_read_is_what_the_file_holds(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("tail") / METRICS
    tail, read, number = Tail(path), [], 0
    torn = ""
    for act, size in [*acts, ("look", 0)]:
        if act == "append":
            with path.open("a") as file:
                for _ in range(size):
                    number += 1
                    file.write(torn + json.dumps({"row": number, "of": "é" * (number % 3)}) + "\n")
                    torn = ""
        elif act == "tear" and path.exists() and not torn:
            number += 1
            line = json.dumps({"row": number, "of": "longer than any"})
            with path.open("a") as file:
                file.write(line[:size])
            torn = line[size:] + "\n"
        elif act == "drop" and path.exists() and not torn:  # as a resume does
            rows = list(read_rows(path.parent))
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(row) + "\n" for row in rows[:size] + rows[size + 2 :]))
            aside.replace(path)
        elif act == "copy" and path.exists():  # as rsync does
            aside = path.with_suffix(".tmp")
            aside.write_bytes(path.read_bytes())
            aside.replace(path)
        elif act == "remove":
            path.unlink(missing_ok=True)
            torn = ""
        elif act == "look":
            news = tail.read()
            read = list(news.lines) if news.anew else read + list(news.lines)
            whole = path.read_text().splitlines() if path.exists() else []
            assert read == (whole[:-1] if torn else whole)
            assert not tail.read()


def test_a_tail_reads_no_byte_twice(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("one\ntw")
    tail = Tail(tmp_path / METRICS)
    assert tail.read().lines == ("one",)
    with (tmp_path / METRICS).open("a") as file:
        file.write("o\nthree\n")
    news = tail.read()
    assert (news.lines, news.anew, tail.offset) == (("two", "three"), False, 14)


def test_a_look_changes_only_what_is_new(log: RunLog) -> None:
    run = RunFolder(log.folder)
    assert run.refresh()
    assert not run.refresh()
    log.begin("rlhf/grpo", 20, start=10)  # a resume: ten rows are dropped
    assert run.refresh()
    assert [row.step for row in run.rows["rlhf/grpo"].steps] == list(range(1, 11))
    log.step("rlhf/grpo", metrics(11, reward=0.0))
    run.refresh()
    assert describe_run(run, 0.0).curves == look(log.folder).curves


# ---- curves


def test_ticks_are_round_and_hold_the_values() -> None:
    ticks, low, high = choose_ticks([0.13, 0.94])
    assert (ticks, low, high) == (pytest.approx([0, 0.25, 0.5, 0.75, 1.0]), 0, 1)
    ticks, low, high = choose_ticks([5.0, 5.0])
    assert low < 5 < high


@settings(max_examples=200)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
@example([5e-324])
@example([1e-20, -3e-19])
@example([1e9, 1e9 + 1e-6])
def test_every_point_lies_inside_its_panel(values: list[float]) -> None:
    panel = draw_panel("t", "x", [Line(name="a", style=0, points=tuple(enumerate(values)))])
    assert panel is not None
    for pair in panel.curves[0].points.split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 100
        assert 0 <= y <= 100


def test_a_point_is_where_its_numbers_say() -> None:
    points = ((0.0, 0.0), (5.0, 1.0), (10.0, 0.5))
    panel = draw_panel("t", "x", [Line(name="a", style=0, points=points)])
    assert panel is not None
    assert panel.curves[0].points == "0,100 50,0 100,50"
    assert draw_panel("t", "x", [Line(name="a", style=0, points=())]) is None


def test_thinning_keeps_the_means() -> None:
    thin = thin_out([(float(i), float(i % 2)) for i in range(1000)], 100)
    assert thin[0] == (4.5, 0.5)
    assert len(thin) == 100
    assert thin_out([(1.0, 2.0)], 100) == [(1.0, 2.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.123456, "0.123"), (12.345, "12.3"), (1234.5, "1,234"), (2e-7, "2.0e-07"), (-0.5, "-0.5")],
)
def test_values_in_words(value: float, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4249, "0.42 s"),
        (8.24, "8.2 s"),
        (42.4, "42 s"),
        (720, "12 min"),
        (12000, "3 h 20 min"),
        (-1, "0 s"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_it_imports_no_ml_library() -> None:
    heavy = {"torch", "ray", "vllm", "matplotlib", "transformers"}
    code = f"import sys, frpo.watch.server; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
