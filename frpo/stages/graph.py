"""What each stage is made from: the fields that their markers give to its kind, the content of what they
name, and the stage that it stands on. No list of fields stands here or elsewhere: the marker stands at the
field (`frpo.config.section`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from frpo.config import Config, Section
from frpo.config.section import Content, Redoes
from frpo.content import Digests
from frpo.disk import sha256_of_json
from frpo.outline import Stage, list_stages
from frpo.records import Made

Marker = TypeVar("Marker", Redoes, Content)


@dataclass(frozen=True)
class Leaf:
    """One value of the configuration."""

    path: str
    value: Any
    """As JSON has it."""
    redoes: Redoes
    content: Content | None


def walk_leaves(section: Section, above: str = "", inherited: Redoes | None = None) -> Iterator[Leaf]:
    """Every value below a section with its marker, its own or that of the nearest section around it.

    `above` is the path of the section with its dot, `"arms.frpo."`; items of a list are counted from 0.
    """
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        path = f"{above}{name}"
        value = getattr(section, name)
        redoes = _marker_of(field, Redoes) or inherited
        if isinstance(value, Section):
            yield from walk_leaves(value, f"{path}.", redoes)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for i, item in enumerate(value):
                yield from walk_leaves(item, f"{path}.{i}.", redoes)
        else:
            assert redoes is not None, f"{path}: say with a marker which stages it redoes"
            yield Leaf(path, plain[name], redoes, _marker_of(field, Content))


def _marker_of(field: FieldInfo, kind: type[Marker]) -> Marker | None:
    return next((marker for marker in field.metadata if isinstance(marker, kind)), None)


def made_from(config: Config, digests: Digests) -> list[tuple[Stage, Made]]:
    """Every stage in order, and what it is made from."""
    common = [leaf for leaf in walk_leaves(config) if not leaf.redoes.one]
    stages: list[tuple[Stage, Made]] = []
    digest_of: dict[str, str] = {}
    for stage in list_stages(config):
        below = digest_of[stage.stands_on] if stage.stands_on else ""
        made = _made_of([*common, *_own_leaves(stage)], stage, below, digests)
        stages.append((stage, made))
        digest_of[stage.name] = made.digest
    return stages


def _made_of(leaves: list[Leaf], stage: Stage, below: str, digests: Digests) -> Made:
    values: dict[str, Any] = {}
    named: dict[str, str] = {}
    kinds = stage.redone_as
    for leaf in leaves:
        if kinds.isdisjoint(leaf.redoes.kinds):
            continue
        if leaf.content:
            values[leaf.path] = digests.of(leaf.content, leaf.value)
            named[leaf.path] = str(leaf.value)
        else:
            values[leaf.path] = leaf.value
    values |= stage.values()
    return Made(digest=sha256_of_json([below, values]), below=below, values=values, named=named)


def _own_leaves(stage: Stage) -> Iterator[Leaf]:
    """What a stage has beyond what all of its kind have: its arm's fields, or its fine-tune's."""
    for path, section in stage.sections().items():
        part = Config.model_fields[path.split(".")[0]]
        yield from walk_leaves(section, f"{path}.", _marker_of(part, Redoes))
