"""What a run redoes in a folder that has run: what it says before, what it keeps, and where it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frpo import content
from frpo.checkpoint import Checkpoints, Progress
from frpo.config import Config, ConfigError
from frpo.metrics import RunLog, read_rows
from frpo.recipe import load_recipe
from frpo.records import Made, StageResult
from frpo.rows import SAMPLES
from frpo.stages import folders
from frpo.stages.folders import look_and_tell, look_at_stages, supersede
from frpo.types import Steering
from tests.support.fakes import Now

TESTBED = Path(__file__).parents[2] / "recipes" / "testbed.yaml"
RL = (
    "downstream=[{kind: rl, name: more, data: [{path: 'testbed:prompts', task_column: task}], "
    "learner: {num_steps: 4}}]"
)
ONE = ("arms=[{name: frpo}]", RL, "certify={}", "learner.num_steps=6")
ALL = ["base", "rlhf/frpo", "certify/frpo", "downstream/frpo/more"]


def wrote(aside: Path) -> Now:
    (aside / "engine").write_text("state")
    return Now([])


def configured(folder: Path, *sets: str) -> Config:
    return load_recipe(TESTBED, (*ONE, *sets, f"run_dir={folder}"))


def states(config: Config) -> dict[str, str]:
    return {s.stage.name: s.state for s in look_at_stages(config)}


def made_up(config: Config, *, leave: tuple[str, ...] = (), zero_stage: int = 1) -> None:
    """Finish every stage with a policy, a checkpoint where one is kept, and a row, a sample and a curve;
    those to `leave` are left after their checkpoint."""
    config.folder.mkdir(exist_ok=True)
    for standing in look_and_tell(config, lambda text: None):
        name, folder = standing.stage.name, folders.begin_stage(config.folder, standing)
        (folder / "policy").mkdir(exist_ok=True)
        (folder / "policy" / "weights").write_text(f"of {name}")
        if name.startswith(("rlhf", "downstream")):
            steps = {"rlhf": config.arms[0].learner.num_steps, "downstream": 4}[standing.stage.kind]
            state = Progress(
                step=steps,
                evaluations=(),
                steering=Steering(0.1, 0.1, None),
                num_workers=config.learner.num_workers,
                zero_stage=zero_stage,
            )
            checkpoints = Checkpoints(folder / "checkpoints", 2)
            checkpoints.begin(state, wrote)
            checkpoints.finish()
        if name not in leave:
            keep = name.startswith(("rlhf", "downstream"))
            folders.finish_stage(
                folder, standing.made, StageResult(stage=name, seconds=1.0, evaluations=()), keep_last=keep
            )
        with RunLog(config.folder, config) as log:
            log._write("step", name, {"step": 1})
            (config.folder / SAMPLES).open("a").write(json.dumps({"stage": name, "step": 1}) + "\n")
        (config.folder / "tensorboard" / name.replace("/", "_")).mkdir(parents=True, exist_ok=True)


def told(config: Config) -> str:
    notes: list[str] = []
    look_and_tell(config, notes.append)
    return "\n".join(notes)


def redo(config: Config) -> Path:
    """Put aside what is to be put aside; gives the folder below superseded/."""
    with RunLog(config.folder, config) as log:
        supersede(config, look_at_stages(config), log)
    (aside,) = (config.folder / "superseded").iterdir()
    return aside


def test_a_finished_run_stands_and_nothing_is_said(tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    config = configured(
        tmp_path,
        "rollout.kv_cache_gib=2",
        "rewards.answer.timeout_s=5",
        "learner.num_workers=2",
        "learner.zero_stage=2",
    )
    assert states(config) == dict.fromkeys(ALL, "done")
    assert told(config) == ""


def test_a_plan_of_a_new_run_reads_no_model_and_a_run_reads_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(content, "_sha256_once", lambda path, key: read.append(path) or "digest")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(100))
    config = configured(tmp_path / "run", f"model.path={tmp_path / 'm'}")
    assert states(config) == dict.fromkeys(ALL, "new")
    assert not (tmp_path / "run").exists()
    assert read == []
    (tmp_path / "run").mkdir()
    for _ in range(3):
        told(config)
    assert [p.name for p in read].count("model.safetensors") == 1


def test_what_counts_is_said_with_its_old_and_new_value(tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    config = configured(tmp_path, "arms.frpo.objective.estimator.lam=0.25")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert states(config) == {"base": "done", **dict.fromkeys(ALL[1:], "other")}
    assert {
        p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()
    } == before  # looking changes nothing
    text = told(config)
    assert (
        "3 of 4 stages are done again from the start: rlhf/frpo, certify/frpo, downstream/frpo/more." in text
    )
    assert "Changed since: arms.frpo.objective.estimator.lam: 2.0 -> 0.25." in text
    assert "What stands on a stage is done again with it." in text
    assert f"in a folder below {tmp_path / 'superseded'}" in text
    assert "--run-dir" in text
    assert "\n" not in text


def test_what_is_superseded_is_kept_in_one_folder_with_its_rows_and_curves(tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    (tmp_path / "wandb.id").write_text("abc")
    (tmp_path / "mlflow.id").write_text("def")
    aside = redo(configured(tmp_path, "arms.frpo.objective.estimator.lam=0.25"))
    moved = ALL[1:]
    for name in ALL:
        place = aside if name in moved else tmp_path
        assert (place / name / "policy" / "weights").read_text() == f"of {name}"
        assert (place / name / "done.json").exists()
        assert (place / "tensorboard" / name.replace("/", "_")).is_dir()
    for rows in ("metrics.jsonl", SAMPLES):
        assert [r["stage"] for r in read_rows(tmp_path, rows)] == ["base"]
        assert [r["stage"] for r in read_rows(aside, rows)] == moved
    assert [(aside / name).read_text() for name in ("wandb.id", "mlflow.id")] == ["abc", "def"]
    assert states(configured(tmp_path, "arms.frpo.objective.estimator.lam=0.25")) == {
        "base": "done",
        **dict.fromkeys(moved, "new"),
    }


def test_a_benchmark_inside_another_ones_folder_is_put_aside_too(tmp_path: Path) -> None:
    harness = "harness={tasks: [a]}"
    made_up(configured(tmp_path, harness))
    aside = redo(configured(tmp_path, harness, "harness.limit=3"))
    names = ("base", "frpo", "frpo/more")
    assert all((aside / "harness" / n / "done.json").exists() for n in names)
    assert not any((tmp_path / "harness" / n / "done.json").exists() for n in names)


@pytest.mark.parametrize(
    ("setting", "change"),
    [("model.lora={rank: 8}", "model.lora: null -> given."), ("base=null", "base: given -> null.")],
)
def test_a_section_that_comes_or_goes_is_said_once(setting: str, change: str, tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    assert f"Changed since: {change}" in told(configured(tmp_path, setting))


def test_content_that_changed_is_named(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("def f(prompts, completions): return [0.0]\n")
    sets = (f"rewards=[{{kind: function, name: f, function: '{code}:f'}}]",)
    made_up(configured(tmp_path / "run", *sets))
    code.write_text("def f(prompts, completions): return [1.0]\n")
    config = configured(tmp_path / "run", *sets)
    assert states(config) == dict.fromkeys(ALL, "other")
    assert f"Changed since: rewards.0.function: the content of {code}:f is another." in told(config)
    code.rename(tmp_path / "other.py")
    text = told(configured(tmp_path / "run", sets[0].replace("code.py", "other.py")))
    assert f"rewards.0.function: {code}:f -> {tmp_path / 'other.py'}:f, which holds something else" in text


def test_a_folder_of_before_is_compared_with_nothing_and_kept(tmp_path: Path) -> None:
    config = configured(tmp_path)
    made_up(config)
    for made in tmp_path.rglob("made.json"):
        made.rename(made.with_name("inputs"))
    assert states(config) == dict.fromkeys(ALL, "other")
    text = told(config)
    assert "4 of 4 stages are done again" in text
    assert "did not write down what counts" in text
    aside = redo(config)
    assert all((aside / name / "policy" / "weights").exists() for name in ALL)


# ---- more steps


def test_more_steps_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    config = configured(tmp_path, "learner.num_steps=12")
    assert states(config) == {
        "base": "done",
        "rlhf/frpo": "longer",
        "certify/frpo": "other",
        "downstream/frpo/more": "other",
    }
    text = told(config)
    assert text.startswith(
        "rlhf/frpo goes on after step 6: arms.frpo.learner.num_steps: 6 -> 12. 2 of 4 stages are done again"
    )
    aside = redo(config)
    assert (tmp_path / "rlhf/frpo/checkpoints/step-00000006/engine").exists()
    assert not (tmp_path / "rlhf/frpo/policy").exists()
    assert (aside / "rlhf/frpo/policy/weights").read_text() == "of rlhf/frpo"
    assert StageResult.model_validate_json((aside / "rlhf/frpo/done.json").read_text()).inputs
    assert (
        Made.model_validate_json((aside / "rlhf/frpo/made.json").read_text()).values[
            "arms.frpo.learner.num_steps"
        ]
        == 6
    )
    assert [r["stage"] for r in read_rows(tmp_path)] == [
        "base",
        "rlhf/frpo",
    ]  # its steps so far are part of the longer stage
    assert [r["stage"] for r in read_rows(aside)] == ALL[1:]
    assert states(config)["rlhf/frpo"] == "longer"  # killed now, the next call goes on too
    redone = look_at_stages(config)
    folders.begin_stage(config.folder, redone[1])
    assert states(config)["rlhf/frpo"] == "begun"


def test_more_steps_of_a_downstream_rl_go_on_too(tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    config = configured(tmp_path, "downstream.more.learner.num_steps=9")
    assert states(config) == {**dict.fromkeys(ALL, "done"), "downstream/frpo/more": "longer"}


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (
            ("learner.schedule=linear",),
            "arms.frpo.learner.schedule is linear, so the learning rate of every step depends on their "
            "number",
        ),
        (("learner.warmup_share=0.5",), "warmup_share is 0.5, so the length of the warm-up depends"),
        (("objective.target_kl=0.5",), "target_kl is 0.5, and how fast the KL may rise depends"),
    ],
)
def test_where_the_end_was_part_of_the_plan_more_steps_begin_again_and_the_reason_is_told(
    sets: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    made_up(configured(tmp_path, *sets))
    config = configured(tmp_path, *sets, "learner.num_steps=12")
    assert states(config)["rlhf/frpo"] == "other"
    assert "arms.frpo.learner.num_steps: 6 -> 12 (from the start: " in told(config)
    assert why in told(config)


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (("learner.num_steps=3",), "its checkpoint is past that, at step 6"),
        (("learner.num_steps=12", "base.num_steps=700"), ""),
        (("learner.num_steps=12", "learner.learning_rate=0.1"), ""),
    ],
)
def test_anything_but_more_steps_begins_again(sets: tuple[str, ...], why: str, tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    config = configured(tmp_path, *sets)
    assert states(config)["rlhf/frpo"] == "other"
    assert (f"(from the start: {why})" in told(config)) == bool(why)


def test_without_its_last_checkpoint_a_stage_begins_again(tmp_path: Path) -> None:
    made_up(configured(tmp_path))
    Checkpoints(tmp_path / "rlhf/frpo/checkpoints", 1).clear()
    config = configured(tmp_path, "learner.num_steps=12")
    assert "(from the start: its last checkpoint is not there)" in told(config)


def test_the_last_checkpoint_is_kept_where_the_stage_could_go_on(tmp_path: Path) -> None:
    from frpo.outline import fixed_end, list_stages
    from frpo.resources import disk_bytes

    kept = {s.name: not fixed_end(s) for s in list_stages(configured(tmp_path))}
    assert kept == {"base": False, "rlhf/frpo": True, "certify/frpo": False, "downstream/frpo/more": True}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(100))
    model = f"model.path={tmp_path / 'm'}"
    constant, linear = (
        disk_bytes(configured(tmp_path, model, f"learner.schedule={s}")) for s in ("constant", "linear")
    )
    assert constant - linear == 2 * 4 * 100
    halves = [
        disk_bytes(configured(tmp_path, model, "model.dtype=bfloat16", f"learner.schedule={s}"))
        for s in ("constant", "linear")
    ]
    assert halves[0] - halves[1] == 2 * 7 * 100  # master weights and moments are float32


# ---- checkpoints of other ranks


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "learner.num_workers=2",
            r"learner.num_workers: 2, but rlhf/frpo was left at step 6 by a checkpoint of 1.*set it "
            r"back to 1 .*--run-dir",
        ),
        (
            "learner.zero_stage=3",
            r"arms.frpo.learner.zero_stage: 3, but rlhf/frpo was left at step 6 by a checkpoint of 1",
        ),
    ],
)
def test_a_checkpoint_that_other_ranks_wrote_is_refused_not_lost(
    setting: str, message: str, tmp_path: Path
) -> None:
    made_up(configured(tmp_path), leave=("rlhf/frpo", "certify/frpo", "downstream/frpo/more"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        look_at_stages(configured(tmp_path, setting))
    with pytest.raises(ConfigError, match=message):
        look_at_stages(configured(tmp_path, setting, "learner.num_steps=12"))
    assert sorted(tmp_path.rglob("*")) == before
    assert states(configured(tmp_path))["rlhf/frpo"] == "begun"


def test_only_checkpoints_are_taken_for_checkpoints(tmp_path: Path) -> None:
    made_up(configured(tmp_path), leave=("rlhf/frpo",))
    checkpoints = tmp_path / "rlhf" / "frpo" / "checkpoints"
    for name in ("step-best", "step-00000009 copy", "step-00000010.tmp"):
        (checkpoints / name).mkdir()
    (checkpoints / "step-00000011").write_text("a file")
    assert states(configured(tmp_path))["rlhf/frpo"] == "begun"
    latest = Checkpoints(checkpoints, 1).latest()
    assert latest is not None
    assert latest.path.name == "step-00000006"


@pytest.mark.parametrize("text", ["null", "3", "[]", "{}"])
def test_progress_that_is_torn_is_no_progress(text: str, tmp_path: Path) -> None:
    made_up(configured(tmp_path), leave=("rlhf/frpo",))
    newest = tmp_path / "rlhf" / "frpo" / "checkpoints" / "step-00000006"
    (newest / "progress.json").write_text(text)
    assert states(configured(tmp_path))["rlhf/frpo"] == "begun"
    (newest / "manifest.json").write_text(text)
    assert Checkpoints(newest.parent, 1).latest() is None
