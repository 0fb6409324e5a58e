"""What each stage is made from: the fields that their markers give to its kind, the content of what they
name, and the stage that it stands on. No list of fields stands here or elsewhere: the marker stands at the
field (`frpo.config.section`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from frpo.config import Config, Section
from frpo.config.section import Content, Redoes
from frpo.content import Digests
from frpo.outline import Stage, arm_of, outline, task_of
from frpo.records import Made


@dataclass(frozen=True)
class Leaf:
    """One value of the configuration."""

    path: str
    value: Any
    """As JSON has it."""
    redoes: Redoes
    content: Content | None


def leaves(section: Section, above: str = "", inherited: Redoes | None = None) -> Iterator[Leaf]:
    """Every value below a section with its marker, its own or that of the nearest section around it."""
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        redoes = _marker(field, Redoes) or inherited
        path, value = f"{above}{name}", getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{path}.", redoes)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for i, item in enumerate(value):
                yield from leaves(item, f"{path}.{i}.", redoes)
        else:
            assert redoes is not None, f"{path}: say with a marker which stages it redoes"
            yield Leaf(path, plain[name], redoes, _marker(field, Content))


def _marker(field: FieldInfo, kind: type[Any]) -> Any:
    return next((m for m in field.metadata if isinstance(m, kind)), None)


def made_from(config: Config, digests: Digests) -> dict[Stage, Made]:
    """What every stage is made from, in order."""
    common = [leaf for leaf in leaves(config) if not leaf.redoes.one]
    found: dict[Stage, Made] = {}
    by_name: dict[str, Made] = {}
    for stage in outline(config):
        below = by_name[stage.stands_on].digest if stage.stands_on else ""
        values, named = dict[str, Any](), dict[str, str]()
        for leaf in [*common, *_own(config, stage)]:
            if stage.kind in leaf.redoes.kinds:
                values[leaf.path] = digests.of(leaf.content, leaf.value) if leaf.content else leaf.value
                if leaf.content:
                    named[leaf.path] = str(leaf.value)
        if stage.radius is not None:
            values["attack.radii"] = stage.radius
        found[stage] = by_name[stage.name] = Made(
            digest=_hash(below, values), below=below, values=values, named=named
        )
    return found


def _own(config: Config, stage: Stage) -> list[Leaf]:
    """What a stage has beyond what all of its kind have: its arm's fields, or its fine-tune's."""
    arms, tasks = type(config).model_fields["arms"], type(config).model_fields["downstream"]
    if stage.kind == "rlhf":
        return list(leaves(arm_of(config, stage), f"arms.{stage.arm}.", _marker(arms, Redoes)))
    if stage.kind == "downstream":
        return list(leaves(task_of(config, stage), f"downstream.{stage.task}.", _marker(tasks, Redoes)))
    return []


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
