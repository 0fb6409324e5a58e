"""What the commands share: their arguments, and the refusal before anything starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from frpo.config import Config, ConfigError, find_cluster


def expand_home(path: str) -> Path:
    """~ in a path that the shell left as it is (--run-dir=~/runs)."""
    return Path(os.path.expanduser(path))


Recipe = Annotated[
    Path,
    typer.Argument(
        help="YAML file, or the name of a recipe that comes with frpo, such as testbed",
        parser=expand_home,
        metavar="RECIPE",
    ),
]
Sets = Annotated[
    list[str], typer.Option("--set", help="field.path=value, as often as you like", metavar="a.b=c")
]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="run folder; default runs/<name>", parser=expand_home, metavar="DIR"),
]


def refuse_if_short(config: Config) -> None:
    """Raises ConfigError where this machine is short of what a run needs."""
    from frpo.joining import refuse_unreachable
    from frpo.planning import plan_run
    from frpo.resources import list_missing_resources

    missing = list_missing_resources(config, plan_run(config))
    if missing:
        raise ConfigError("\n".join(missing))
    cluster = find_cluster(config.cluster.address)
    if cluster:
        refuse_unreachable(*cluster)
