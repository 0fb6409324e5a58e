"""What a policy was made from beside the configuration of its run: files, and data sets of the hub, as its
stages wrote them down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from frpo.config.section import Content
from frpo.content import Digests, code_files
from frpo.files import names_hub
from frpo.records import Made
from frpo.report.portable import shorten_path
from frpo.rewards.template import template_file

KINDS = (
    (r"model\.path", "the model that it begins from"),
    (r"base\.data\.", "examples of the base model's fine-tune"),
    (r"data\.train\.", "prompts to train on"),
    (r"data\.heldout\.", "held-out prompts"),
    (r"rewards\.\d+\.function", "reward function"),
    (r"rewards\.\d+\.template", "a judge's template"),
    (r"rewards\.\d+\.path", "a reward's model"),
    (r"downstream\.(.+)\.heldout\.", r"held-out examples of the fine-tune \1"),
    (r"downstream\.(.+)\.data\.", r"data of the fine-tune \1"),
)
"""Fields that name files, and what these are."""
TRAINS = re.compile(r"(base\.data|data\.train)\.")
"""Fields of what a policy is trained on."""


GENERATED = re.compile(r"[a-z_]+:")
"""Names of data and models that frpo makes itself."""


@dataclass(frozen=True)
class Needed:
    """A file or folder without which the run cannot be made again."""

    path: str
    """As the configuration has it that is shipped."""
    kind: str
    sha256: str | None
    """Of a file's bytes; of a folder as `frpo.content` makes it. None where it is no longer here as the run
    read it."""


@dataclass(frozen=True)
class Origins:
    files: tuple[Needed, ...] = ()
    datasets: tuple[str, ...] = ()
    """Of the hub, that the policy was trained on."""


def read_origins(run: Path, arm: str) -> Origins:
    """Of an arm's policy, and of what was measured of it."""
    digests = Digests(run)
    files, datasets = dict[Needed, None](), set[str]()
    for made in _read_made(run, arm):
        for field, name in made.named.items():
            digest = str(made.values[field])
            if TRAINS.match(field) and digest == name and names_hub(name):
                datasets.add(name)
            for path, known in _files_behind(field, name, digest, digests):
                files[Needed(path, _kind_of(field), known)] = None
    return Origins(tuple(files), tuple(sorted(datasets)))


def _read_made(run: Path, arm: str) -> Iterator[Made]:
    """What the stages were made from, as far as it can be read."""
    for stage in (run / "base", run / "rlhf" / arm, *sorted((run / "downstream" / arm).glob("*"))):
        with suppress(OSError, ValueError):
            yield Made.model_validate_json((stage / "made.json").read_text())


def _files_behind(field: str, name: str, digest: str, digests: Digests) -> Iterator[tuple[str, str | None]]:
    """(path, SHA-256) of what a field names; nothing for what comes with frpo or from the hub."""
    if field.endswith(".function"):
        as_it_was = digests.of(Content("code"), name) == digest
        for path, file in code_files(name).items():
            yield path, digests.file(file) if as_it_was else None
    elif digest != name and not GENERATED.match(name) and template_file(name) == Path(name):
        yield shorten_path(name), None if digest == "missing" else digest


def _kind_of(field: str) -> str:
    return next((found.expand(kind) for form, kind in KINDS if (found := re.match(form, field))), field)
