"""YAML text -> a tree of plain values, and back. What a person may get wrong in it is one ConfigError with
its line.

Scalars are read as YAML 1.2 has them where 1.1 surprises: 1e-5 is a number; dates, 12:30 and 007 are strings.
yes and no stay truth values, as people expect of PyYAML.
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from typing import Any

import yaml

from frpo.config import ConfigError

MOST_VALUES = 20_000
"""Values in a file once its aliases are written out: a few nested aliases make billions."""
DEEPEST = 100
"""Levels of a file: a few thousand brackets take PyYAML minutes."""


class Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {DEEPEST} levels deep", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes whatever string another reader could take for something else."""


INT = re.compile(r"^[-+]?(0|[1-9][0-9]*)$|^0x[0-9a-fA-F]{1,16}$|^0o[0-7]{1,22}$")
FLOAT = re.compile(
    r"^[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
YAML_TAG = "tag:yaml.org,2002:"
PLAIN = {YAML_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")}
"""What JSON can hold too: a recipe is kept and compared as that."""
REPLACED = tuple(YAML_TAG + kind for kind in ("int", "float", "timestamp"))
"""What YAML 1.1 takes more for than 1.2 does."""

Loader.yaml_implicit_resolvers = {}
for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items():
    Loader.yaml_implicit_resolvers[first] = [(tag, pattern) for tag, pattern in known if tag not in REPLACED]
for reader_or_writer in (Loader, Dumper):
    reader_or_writer.add_implicit_resolver(YAML_TAG + "int", INT, list("-+0123456789"))
    reader_or_writer.add_implicit_resolver(YAML_TAG + "float", FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; None for an empty one. `where` names it in messages. Raises
    ConfigError."""
    return _copy_parts(_construct(text, where))


@lru_cache(maxsize=64)
def _construct(text: str, where: str) -> Any:
    """A value that aliases and later calls share. PyYAML takes 8 ms for a recipe, and whoever ships a policy
    reads its own ten times."""
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {_words_of(error)}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{where}: not valid YAML: character {error.position + 1} is no text; save it as UTF-8 text"
        ) from None
    except KeyError as error:  # !!bool of another word
        raise ConfigError(f"{where}: not valid YAML: {error} is no truth value") from None
    except ValueError as error:  # such as a number of 5,000 digits
        raise ConfigError(f"{where}: not valid YAML: {str(error).partition(';')[0]}") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: Any, **options: Any) -> str:
    """YAML that `parse` and YAML 1.1 readers read back to the same value."""
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, **options)
    return text


def _words_of(error: yaml.MarkedYAMLError) -> str:
    context, mark = error.context, error.context_mark
    if context and mark and error.problem_mark and mark.line < error.problem_mark.line:
        context = f"{context} (line {mark.line + 1})"
    words = ", ".join(part for part in (context, error.problem) if part)
    return f"{words}; indent with blanks" if "'\\t'" in words else words


def _count_values(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values below and with a node, aliases written out. Raises ConstructorError for too many, for
    an alias of what it stands in, for a key that stands twice, of which only the last would count, and for
    what is no JSON."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise _error_at(node, "an alias stands inside what it names")
        return sizes[id(node)]
    if node.tag not in PLAIN:
        raise _error_at(node, f"a value of kind {node.tag.removeprefix(YAML_TAG)}; leave the tag out")
    sizes[id(node)] = 0
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        below = list(itertools.chain.from_iterable(node.value))
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    sizes[id(node)] = 1 + sum(_count_values(part, sizes) for part in below)
    if sizes[id(node)] > MOST_VALUES:
        raise _error_at(node, f"more than {MOST_VALUES} values, aliases written out")
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != YAML_TAG + "merge":
            if key.value in lines:
                raise _error_at(
                    key, f"{key.value!r} stands here and in line {lines[key.value]}; keep one of them"
                )
            lines[key.value] = key.start_mark.line + 1


def _error_at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _copy_parts(value: Any) -> Any:
    """A copy in which what came from one anchor can be changed in one place alone."""
    if isinstance(value, dict):
        return {key: _copy_parts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy_parts(item) for item in value]
    return value
