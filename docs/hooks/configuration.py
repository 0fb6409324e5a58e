"""The page of every field, made from the fields: name, kind, default, docstring, and the stages that it
redoes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from frpo.config import Config, Section
from frpo.config.section import Redoes
from frpo.config.service import ServiceConfig

PAGE = "configuration.md"

HEAD = """# Configuration

Every field of a recipe, and of the file of `frpo serve`. `frpo config RECIPE` prints the same beside the
values of a recipe. A recipe is YAML; `--set a.b=value` changes one of its fields. An arm, and a fine-tune by
reinforcement learning, take what they do not say from the `objective` and the `learner` of the run.

*Redone* are the stages that are done again after a change of the field, with all that stands on them. Where
nothing is said, that of the field holds in which the section stands.
"""

OF_THE_MACHINE = 2**31
"""A bound from here on says nothing to a reader."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, PAGE, content=write_page()))
    return files


def write_page() -> str:
    titles = {"Config": "Recipe", "ServiceConfig": "File of frpo serve"}
    lines = [HEAD]
    for section, places in {**places_of(Config), **places_of(ServiceConfig)}.items():
        lines += [f"## {titles.get(section.__name__, section.__name__)}", ""]
        if all(places):
            lines += [f"At {', '.join(f'`{place}`' for place in places)}.", ""]
        lines += [*describe_section(section), ""]
    return "\n".join(lines)


def places_of(root: type[Section], place: str = "") -> dict[type[Section], list[str]]:
    """A section and those below it, in the order in which a reader meets them, with the paths at which they
    stand; `*` is a number or a name in a list."""
    places = {root: [place]}
    for name, field in root.model_fields.items():
        inside = f"{place}.{name}".lstrip(".")
        for section in sections_in(field.annotation):
            is_item = get_origin(field.annotation) is tuple
            for below, paths in places_of(section, f"{inside}.*" if is_item else inside).items():
                places.setdefault(below, []).extend(paths)
    return places


def sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    sections: list[type[Section]] = []
    for part in get_args(annotation):
        sections += sections_in(part)
    return sections


def describe_section(section: type[Section]) -> Iterator[str]:
    """What it is, and a row for each of its fields."""
    if section.__doc__:
        yield from (in_a_line(section.__doc__), "")
    yield "| field | kind | default | redone | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    nodes = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        cells = (
            f"`{name}`",
            describe_kind(nodes[name]),
            describe_default(nodes[name], field),
            describe_redone(field),
            in_a_line(field.description or ""),
        )
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def in_a_line(text: str) -> str:
    return " ".join(text.split())


def describe_kind(node: Mapping[str, Any]) -> str:
    """A node of a JSON schema in words."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if choices := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(describe_kind(choice) for choice in choices)
    if values := node.get("enum") or [node[key] for key in ("const",) if key in node]:
        return ", ".join(f"`{value}`" for value in values)
    if node.get("type") == "array":
        return f"list of {describe_kind(node['items'])}"
    if node.get("type") == "object":
        inner = node.get("additionalProperties")
        return f"map to {describe_kind(inner)}" if isinstance(inner, dict) else "map"
    return node.get("format") or " ".join([node.get("type", "anything"), *bounds_of(node)])


SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def bounds_of(node: Mapping[str, Any]) -> list[str]:
    bounds = {sign: node[key] for key, sign in SIGNS.items() if key in node}
    return [f"{sign} {bound:g}" for sign, bound in bounds.items() if bound < OF_THE_MACHINE]


def describe_default(node: Mapping[str, Any], field: FieldInfo) -> str:
    """Empty for a section, whose fields have their own."""
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        return ""
    if field.is_required():
        return "required"
    value = node.get("default")
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def describe_redone(field: FieldInfo) -> str:
    """Its own mark; empty where it has that of what holds it."""
    marks = [mark for mark in field.metadata if isinstance(mark, Redoes)]
    if not marks:
        return ""
    return ", ".join(marks[0].kinds) or "nothing"
