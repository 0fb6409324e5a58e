"""The command line as a user meets it: speed, exit codes, and one message per mistake."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml

from frpo.cli import app
from frpo.config import ConfigError, ModelConfig
from frpo.ending import resumable
from frpo.metrics import RunLog
from frpo.model_checks import weight_bytes
from frpo.outline import list_stages
from frpo.preflight import check_attention
from frpo.recipe import load_recipe
from frpo.roles import WorkerFailed
from frpo.stops import RunStopped
from tests.support.command_line import CommandLine
from tests.support.runs import options_of

ROOT = Path(__file__).parents[2]
TESTBED = str(ROOT / "recipes" / "testbed.yaml")
HEAVY = {"torch", "transformers", "vllm", "deepspeed", "peft", "datasets", "ray"}


def test_the_module_is_the_command_line() -> None:
    command = [sys.executable, "-m", "frpo", "run", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, "recipe nowhere.yaml: No such file" in done.stderr) == (2, True)


def test_every_argument_and_option_says_what_it_is() -> None:
    commands = vars(typer.main.get_command(app))["commands"]
    told = {}
    for name, command in commands.items():
        told |= {f"{name} {taken.name}": taken.help for taken in command.params}
    assert len(told) > 50
    assert [which for which, text in told.items() if not text] == []


@pytest.mark.parametrize("command", ["config", "plan"])
def test_config_and_plan_import_no_ml_library(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['frpo', {command!r}, {TESTBED!r}]\n"
        "from frpo.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: code = e.code\n"
    )
    code += f"print('HEAVY', sorted(set(sys.modules) & {HEAVY!r}), code)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0", done.stdout[-500:] + done.stderr
    assert (
        time.perf_counter() - began < 10
    )  # 0.8 s on an idle machine; the bound only catches a library that crept in


def test_a_run_that_stops_says_once_why_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["frpo", "run", "r.yaml", "--run-dir", "a b"])
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as end,
        resumable(load_recipe(Path(TESTBED)), lambda: "rlhf/frpo, after step 3"),
    ):
        raise RunStopped("all 72 rewards failed: the judge is out")
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "The run stopped (rlhf/frpo, after step 3): all 72 rewards failed: the judge is out\n"
        "Its log is run.log in the run folder. Resume with: frpo run r.yaml --run-dir 'a b'\n"
    )


def full_disk(*_: object) -> None:
    """As the system says it."""
    with open("/dev/full", "w") as file:
        file.write("a row")


def full_disk_of_an_actor(*_: object) -> None:
    try:
        full_disk()
    except OSError as error:
        raise WorkerFailed(f"learner worker 0 failed in written(): {type(error).__name__}: {error}") from None


@pytest.mark.parametrize("fill", [full_disk, full_disk_of_an_actor])
def test_a_disk_that_is_full_is_said_with_what_is_lost(
    fill: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["frpo", "run", "r.yaml"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), resumable(load_recipe(Path(TESTBED)), lambda: "rlhf/frpo, after step 3"):
        fill()
    signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert said.startswith("The run stopped (rlhf/frpo, after step 3): ")
    assert "[Errno 28] No space left on device. What is saved is whole" in said
    assert "make room, then resume" in said


def fill(log: RunLog) -> None:
    log.note("on its way")
    log.file.write("a row")
    log.file.flush()


def test_a_full_disk_under_the_log_itself_ends_in_that_paragraph_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["frpo", "run", "r.yaml"])
    before = signal.getsignal(signal.SIGTERM)
    config = load_recipe(Path(TESTBED), (f"run_dir={tmp_path}",))
    for name in ("metrics.jsonl", "run.log"):
        (tmp_path / name).symlink_to("/dev/full")
    with (
        pytest.raises(SystemExit, match="1"),
        RunLog(tmp_path, config) as log,
        resumable(config, lambda: log.where),
    ):
        fill(log)
    signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert said.startswith("The run stopped (before the first stage): [Errno 28] No space left on device.")
    assert len(said.splitlines()) == 2


def test_config_prints_what_loads_back(tmp_path: Path, frpo: CommandLine) -> None:
    done = frpo("config", TESTBED, "--set", "arms.frpo.objective.estimator.lam=0.2")
    assert done.code == 0
    assert "lam: 0.2  # Temperature of the robust objective" in done.out
    (tmp_path / "again.yaml").write_text(done.out)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(
        Path(TESTBED), ("arms.frpo.objective.estimator.lam=0.2",)
    )


def test_plan_says_sizes_in_prompts_and_completions(frpo: CommandLine) -> None:
    done = frpo("plan", TESTBED)
    assert done.code == 0
    assert "24 prompts x 8 completions = 192 completions of at most 7 tokens" in done.out
    assert "Nothing is missing" in done.out


def test_a_valid_recipe_that_cannot_run_here_exits_3_from_plan_and_2_from_run(
    tmp_path: Path, frpo: CommandLine
) -> None:
    big = ("--set", "rollout.num_workers=64")
    done = frpo("plan", TESTBED, *big)
    assert done.code == 3
    assert "Missing CPUs: the plan needs 16.75" in done.out
    assert "Nothing is missing" not in done.out
    done = frpo("run", TESTBED, *big, "--run-dir", str(tmp_path / "run"))
    assert done.code == 2
    assert "CPUs: the plan needs 16.75" in done.err
    assert not (tmp_path / "run").exists()


def test_a_service_that_does_not_answer_is_missing_and_a_wrong_row_is_wrong(
    tmp_path: Path, frpo: CommandLine
) -> None:
    far = "rewards=[{kind: url, name: far, urls: ['http://127.0.0.1:9/get_reward']}]"
    done = frpo("plan", TESTBED, "--set", far)
    assert done.code == 3
    assert "Missing rewards.0.urls: http://127.0.0.1:9/get_reward: no connection" in done.out
    assert "rlhf/frpo-reverse" in done.out
    (tmp_path / "rows.jsonl").write_text('{"prompt": "[bold]a[/bold]", "task": "t"}\n{"prompt": 7}\n')
    done = frpo("plan", TESTBED, "--set", f"data.train.0.path={tmp_path / 'rows.jsonl'}", "--set", far)
    assert done.code == 2
    assert "Missing" not in done.out


def test_plan_lists_every_stage_and_counts_all_that_it_draws(tmp_path: Path, frpo: CommandLine) -> None:
    (tmp_path / "task.yaml").write_text("task: t\n")
    sets = (
        "certify={}",
        "attack={radii: [0.5], num_steps: 10}",
        f"harness={{tasks: [{tmp_path / 'task.yaml'}]}}",
        "evaluate.max_prompts=5",
    )
    done = frpo("plan", TESTBED, *options_of(sets))
    assert done.code == 0, done.out + done.err
    rows = {
        cells[0]: cells[1:4]
        for line in done.out.splitlines()
        if len(cells := [c.strip() for c in line.strip("│").split("│")]) == 5
    }
    assert [name for name in rows if rows[name]] == [
        s.name for s in list_stages(load_recipe(Path(TESTBED), sets))
    ]
    assert rows["base"] == ["600", "0", "240"]  # 5 prompts of each of 3 tasks x 16 completions
    assert rows["rlhf/frpo"] == [
        "100",
        "19,200",
        "270",
    ]  # and one validation, at step 50, of 2 completions each
    assert rows["certify/frpo"] == ["0", "0", "640"]  # 5 prompts of each of the 2 trained tasks x 64
    assert rows["downstream/frpo/crafts-harsh"] == ["200", "0", "960"]  # at 0, 25, 100 and 200
    assert rows["attack/frpo/0.5"] == ["10", "1,920", "480"]  # in the middle and at the end
    assert rows["harness/frpo"] == ["0", "0", "not known"]
    drawn = 240 + 4 * (19200 + 270 + 640 + 2 * 960 + 1920 + 480)
    assert f"Completion tokens drawn: at most {drawn * 7:,}, and what the benchmarks draw" in done.out


NO_TENSORS = len(b"{}").to_bytes(8, "little") + b"{}"  # a safetensors file of none
ROWS = '{"prompt": "a", "task": "t"}\n{"prompt": "b", "task": "t"}\n'

MISTAKES = [
    (("--set", "rollout.temprature=1"),
     "rollout.temprature: unknown field (value 1); did you mean temperature?"),
    (("--set", "rewards.0.function=frpo.rewards.code:evalplus"),
     "rewards.0.arguments.allow_code_execution: this reward runs code"),
    (
        ("--set", "rewards=[{{kind: url, name: far, urls: ['http://127.0.0.1:9/get_reward']}}]"),
        "rewards.0.urls: http://127.0.0.1:9/get_reward: no connection (Connection refused); start the "
        "service",
    ),
    (("--set", "rewards=[{{kind: serve, name: here}}]"),
     "rewards.0.kind: serve needs the Ray cluster of the service"),
    (("--set", "combine=product", "--set", "rewards.0.weight=2"),
     "rewards.answer.weight: 2 has no meaning in a product"),
    (("--set", "objective.estimator.lam=0"),
     "objective.estimator.lam: Input should be greater than 0 (value 0)"),
    (("--set", "arms.frpo.objective.estimator.rho=2.2"),
     "arms.frpo.objective.estimator.rho: 2.2 is not below log k = 2.08 nats"),
    (("--set", "arms.grpo.objective.estimator.rho=0.3"),
     "rho: it is a field of frpo, and the kind here is grpo (value 0.3)"),
    (("--set", "objective.lam=0.5"),
     "objective.lam: it is a field of the estimator; "
     "write objective.estimator: {kind: frpo, lam: 0.5} (value 0.5)"),
    (("--set", "arms.grpo.objective.target_kl=0.5", "--set", "arms.grpo.objective.beta=0"),
     "target_kl: 0.5 is reached by steering beta, which is 0"),
    (("--set", "attack={{radii: [0.5, 0.5], num_steps: 5}}"), "attack.radii: the name '0.5' stands twice"),
    (("--set", "attack.radii=[]", "--set", "attack.num_steps=5"),
     "attack.radii: Tuple should have at least 1 item"),
    (("--set", "downstream.0.kind=dpo"), "downstream.0.kind: 'dpo' is unknown; choose sft or rl"),
    (("--set", "rollout.group_size=1"),
     "rollout.group_size: Input should be greater than or equal to 2 (value 1)"),
    (("--set", "learner.num_workers=500"),
     "learner.num_workers: 500 ranks share a batch of 192 (rollout.prompts_per_step x rollout.group_size)"),
    (("--set", "learner.num_workers=40"),
     "learner.num_workers: 40 ranks share a batch of 32 "
     "(downstream.crafts-gentle.batch_size); use at most 32"),
    (("--set", "base.num_workers=2"),
     "base.num_workers: it is trained by the learner's ranks; set learner.num_workers"),
    (("--set", "downstream.0.num_cpus=1"),
     "downstream.crafts-gentle.num_cpus: it is trained by the learner's ranks; set learner.num_cpus"),
    (("--set", "arms.frpo.learner.num_gpus=1"),
     "arms.frpo.learner.num_gpus: it is trained by the learner's ranks; set learner.num_gpus"),
    (
        ("--set",
         "downstream=[{{kind: rl, name: more, data: [{{path: 'testbed:prompts', task_column: task}}], "
         "learner: {{num_threads: 2}}}}]"),
        "downstream.more.learner.num_threads: it is trained by the learner's ranks; set learner.num_threads",
    ),
    (("--set", "learner.micro_batch_tokens=4"), "learner.micro_batch_tokens: 4 is less than one sequence"),
    (("--set", "model.path=/no/such/model"), "model.path: no such folder /no/such/model"),
    (("--set", "rewards.answer.function=frpo.rewards:exact"),
     "rewards.0.function: frpo.rewards has no function 'exact'"),
    (("--set", "rewards.answer.function=nowhere:f"), "rewards.0.function: 'nowhere' cannot be imported"),
    (("--set", "rewards.answer.arguments.anwser=x"),
     "rewards.0.arguments.anwser: frpo.rewards:exact_answer takes no such argument"),
    (
        ("--set", "data.train.0.path={rows}"),
        "rewards.0.function: frpo.rewards:exact_answer asks for 'answer', and ",
    ),
    (("--set", "rewards.answer.function=frpo.rewards"), "write module:function or file.py:function"),
    (("--set", "arms.nobody.objective.estimator.lam=1"),
     "no item 'nobody' here; choose a position or one of ['grpo', 'frpo', 'grpo-reverse', 'frpo-reverse']"),
    (("--set", "downstream.0.marks=[900]"), "downstream.crafts-gentle.marks: 900 is after the last step 200"),
    (("--set", "data.train.0.path=nowhere.jsonl"), "data set nowhere.jsonl: no such file"),
    (("--set", "data.train.0.path={rows}", "--set", "data.train.0.prompt=question"),
     "rows.jsonl:1: no column 'question'; it has prompt, task"),
    (("--set", "data.train.0.path={bad}"),
     "bad.jsonl:3: column 'prompt' is 7; it must be a non-empty string or a list of chat messages"),
    (("--set", "data.train.0.path={torn}"), "torn.jsonl:2: not valid JSON"),
    (("--set", "data.train.0.task_column=kind", "--set", "data.train.0.path={rows}"),
     "rows.jsonl:1: no column 'kind'"),
    (("--set", "model.path={cut}"), "cut/model.safetensors is torn ("),
    (("--set", "model.path={odd}"), "has head_dim 48; vLLM on the CPU serves 32, 64"),
    (("--set", "model.path={short}", "--set", "data.max_prompt_tokens=30"),
     "rollout.max_new_tokens: 30 + 7 and one more token do not fit the 37 positions"),
    (("--set", "model.path={short}", "--set", "harness={{tasks: [gsm8k], max_tokens: 99}}"),
     "harness.max_tokens: 99 and one more token do not fit"),
    (("--set", "model.attention=flash_attention_2"),
     "model.attention: flash_attention_2 runs on a GPU, and learner.num_gpus is 0"),
    (("--run-dir", "/proc/nowhere"), "run_dir: /proc/nowhere cannot be written"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[m[:40] for _, m in MISTAKES])
def test_a_mistake_is_one_message_and_exit_code_2_before_anything_starts(
    args: tuple[str, ...], message: str, tmp_path: Path, frpo: CommandLine
) -> None:
    files = {"rows": ROWS, "bad": ROWS + '{"prompt": 7, "task": "t"}\n', "torn": ROWS[:40]}
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"hidden_size": 384, "num_attention_heads": 8}')
    (tmp_path / "odd" / "model.safetensors").write_bytes(NO_TENSORS)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text("{}")
    (tmp_path / "cut" / "model.safetensors").write_bytes(NO_TENSORS[:-1])
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text('{"max_position_embeddings": 37}')
    (tmp_path / "short" / "model.safetensors").write_bytes(NO_TENSORS)
    places = {name: str(tmp_path / f"{name}.jsonl") for name in files} | {
        name: str(tmp_path / name) for name in ("odd", "cut", "short")
    }
    filled = [a.format(**places) if "=" in a and "{" in a else a for a in args]
    folder = [] if "--run-dir" in args else ["--run-dir", str(tmp_path / "run")]
    assert message in frpo.refuses("run", TESTBED, *filled, *folder)
    assert not (tmp_path / "run").exists()


def test_flash_attention_without_its_package_is_refused() -> None:
    config = load_recipe(Path(TESTBED), ("model.attention=flash_attention_2", "learner.num_gpus=1"))
    if importlib.util.find_spec("flash_attn"):
        check_attention(config)
    else:
        with pytest.raises(
            ConfigError, match=r"model\.attention: flash_attention_2 needs the package flash_attn"
        ):
            check_attention(config)


def test_a_recipe_without_arms_has_its_base_to_fine_tune(tmp_path: Path, frpo: CommandLine) -> None:
    tree = yaml.safe_load(Path(TESTBED).read_text())
    del tree["arms"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    done = frpo("plan", str(tmp_path / "r.yaml"))
    assert done.code == 0
    stages = [line.split("│")[1].strip() for line in done.out.splitlines() if "base" in line]
    assert stages == ["base", "downstream/base/crafts-gentle", "downstream/base/crafts-harsh"]


@pytest.mark.parametrize(
    ("saved", "dtype", "factor"),
    [("bfloat16", "float32", 2), ("float32", "float32", 1), ("bfloat16", "bfloat16", 1)],
)
def test_the_size_of_a_model_is_that_of_its_loaded_weights(
    tmp_path: Path, saved: str, dtype: str, factor: int
) -> None:
    (tmp_path / "config.json").write_text(f'{{"dtype": "{saved}"}}')
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    model = ModelConfig.model_validate({"path": str(tmp_path), "dtype": dtype})
    assert weight_bytes(model) == 1000 * factor
    assert weight_bytes(ModelConfig(path="organisation/name")) == 0


LENGTH = ("--reward", "frpo.rewards:length")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("{missing}", "{rows}", *LENGTH), "MODEL: no such folder"),
        (("no/where", "{rows}", *LENGTH), "MODEL: no/where is neither a folder here nor whole in the cache"),
        (
            ("{astray}", "{rows}", *LENGTH),
            "adapter_config.json: base_model_name_or_path: no such folder /moved/base; write there where",
        ),
        (("{odd}", "nowhere.jsonl", *LENGTH), "data set nowhere.jsonl: no such file"),
        (
            ("{odd}", "{rows}", "--reward", "frpo.rewards:nothing"),
            "--reward: frpo.rewards has no function 'nothing'",
        ),
        (
            ("{odd}", "{rows}", "--reward", "no/where"),
            "--reward: no/where is neither a folder here nor whole in the cache",
        ),
        (
            ("{odd}", "{rows}", "--reward", "{odd}", "--argument", "a=1"),
            "odd is a reward model, which takes none; leave it out",
        ),
        (("{odd}", "{rows}", *LENGTH, "--argument", "scale"), "--argument scale: write it as key=value"),
        (("{odd}", "{rows}", *LENGTH, "--argument", "a={{1"), "--argument a={1: not valid YAML"),
        (
            ("{odd}", "{rows}", *LENGTH, "--argument", "a=1", "--argument", "a=2"),
            "--argument a=2: a stands twice; give it once",
        ),
        (("{odd}", "{rows}", *LENGTH, "--where", "=x"), "--where =x: write it as key=value"),
        (("{odd}", "{rows}", *LENGTH, "--where", "task=other"), "rows.jsonl: no row left after where"),
        (
            ("{odd}", "{rows}", *LENGTH, "--heldout-share", "2"),
            "--heldout-share: Input should be less than or equal to 1 (value 2.0)",
        ),
        (
            ("{odd}", "{rows}", *LENGTH, "--radius", "-1"),
            "--radius.0: Input should be greater than 0 (value -1.0)",
        ),
        (
            ("{odd}", "{rows}", *LENGTH, "--radius", "1", "--radius", "1.0"),
            "--radius: a radius stands twice; give each once",
        ),
        (
            ("{odd}", "{rows}", *LENGTH, "--radius", "inf"),
            "--radius.0: Input should be a finite number (value inf)",
        ),
        (("{odd}", "{rows}", *LENGTH, "--floor", "nan"), "--floor: Input should be a finite number"),
        (("{odd}", "{rows}", *LENGTH, "--completions", "1"), "--completions: Input should be greater"),
        (
            ("{odd}", "{rows}", *LENGTH, "--max-new-tokens", "0"),
            "--max-new-tokens: Input should be greater than 0 (value 0)",
        ),
        (("{odd}", "{rows}", *LENGTH, "--radius", "wide"), "Invalid value for '--radius'"),
    ],
)
def test_mistakes_of_certify(
    args: tuple[str, ...], message: str, tmp_path: Path, frpo: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"head_dim": 64}')
    (tmp_path / "odd" / "model.safetensors").write_bytes(NO_TENSORS)
    (tmp_path / "astray").mkdir()
    (tmp_path / "astray" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "/moved/base"}'
    )
    (tmp_path / "astray" / "adapter_model.safetensors").write_bytes(NO_TENSORS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {n: str(tmp_path / n) for n in ("missing", "odd", "astray")} | {
        "rows": str(tmp_path / "rows.jsonl")
    }
    assert message in frpo.refuses(
        "certify", *(a.format(**places) for a in args), "--out", str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()
