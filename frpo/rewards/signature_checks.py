"""Whether a reward function can be called on the rows of a data set, found before anything starts.

Every check raises ConfigError naming the field, the function and the remedy.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from frpo.config import ConfigError, FunctionReward
from frpo.rewards.loading import load_function
from frpo.rewards.signatures import (
    Function,
    Parameters,
    calling_shape,
    given_names,
    makes_the_function,
    parameters_of,
)

RUNS_OWN = (
    "prompts",
    "completions",
    "completion_ids",
    "messages",
    "queries",
    "solution_str",
    "solution_strs",
)
"""What no argument may stand in for."""


def check_signature(
    reward: FunctionReward, columns: Collection[str] | None, field: str, where: str = "a row"
) -> None:
    """That a call binds on rows with these columns (None: not known yet). Raises ConfigError naming
    parameter, function and remedy."""
    function = load_function(reward.function, f"{field}.function")
    arguments = dict(reward.arguments)
    if makes_the_function(function, arguments):  # not made here: it may load a model
        if not isinstance(function, type):
            return
        own = parameters_of(function).names
        function = _call_of_instances(function, reward, field)
        arguments = {name: value for name, value in arguments.items() if name not in own}
    _check_callable(function, reward, field)
    _check_arguments(function, arguments, columns, reward, field)
    if str(getattr(function, "__module__", "")).startswith("frpo."):
        _check_ready_made(function, reward.arguments, columns, f"{field}.arguments", where)
    if columns is not None:
        _check_columns(parameters_of(function), columns, reward, field, where)


def _call_of_instances(made_by: type, reward: FunctionReward, field: str) -> Function:
    """The __call__ of the instances of a class, bound to nobody: for its signature."""
    missing = [name for name in parameters_of(made_by).required if name not in reward.arguments]
    if missing:
        raise ConfigError(
            f"{field}.function: the class {reward.function} asks for {missing[0]!r}; give it in "
            f"{field}.arguments"
        )
    call = next((vars(base)["__call__"] for base in made_by.__mro__ if "__call__" in vars(base)), None)
    if not inspect.isfunction(call):
        raise ConfigError(
            f"{field}.function: instances of the class {reward.function} cannot be called; give it a __call__"
        )
    return partial(call, None)


def _check_callable(function: Function, reward: FunctionReward, field: str) -> None:
    takes = parameters_of(function)
    if not (takes.names or takes.required or takes.rest):
        raise ConfigError(
            f"{field}.function: {reward.function} takes nothing by keyword; name what it reads, such as "
            "completions"
        )
    if inspect.isasyncgenfunction(function):
        raise ConfigError(
            f"{field}.function: {reward.function} is an async generator, which nothing waits for; return a "
            "list instead"
        )


def _check_arguments(
    function: Function,
    arguments: Collection[str],
    columns: Collection[str] | None,
    reward: FunctionReward,
    field: str,
) -> None:
    """That the function takes the arguments of each call, and that none is the run's own to give."""
    takes = parameters_of(function)
    for name in arguments:
        if name in RUNS_OWN:
            raise ConfigError(
                f"{field}.arguments.{name}: the run itself gives this to {reward.function}; leave it out"
            )
        if name not in takes.names and not _takes_any(function, takes):
            given = given_names(calling_shape(takes.names), columns or ())
            known = ", ".join(sorted(takes.names - given)) or "none"
            raise ConfigError(
                f"{field}.arguments.{name}: {reward.function} takes no such argument; it takes: {known}"
            )


def _takes_any(function: Function, takes: Parameters) -> bool:
    """A ready-made function lets **_ take columns, never a misspelt argument."""
    ready_made = hasattr(function, "reads_text")
    return takes.rest and (not ready_made or "columns" in inspect.signature(function).parameters)


def _check_columns(
    takes: Parameters, columns: Collection[str], reward: FunctionReward, field: str, where: str
) -> None:
    """That rows and arguments hold all that the function asks for."""
    shape = calling_shape(takes.names)
    given = {*given_names(shape, columns), *reward.arguments}
    missing = [name for name in takes.required if name not in given]
    if missing:
        raise ConfigError(
            f"{field}.function: {reward.function} asks for {missing[0]!r}, and {where} has no such column "
            f"(it has: {_join_names(columns)}). Functions are called by keyword, this one as in {shape}: "
            f"rename its parameter or the column, or give {field}.arguments"
        )


def _check_ready_made(
    function: Function, arguments: Mapping[str, Any], columns: Collection[str] | None, field: str, where: str
) -> None:
    """What our own signatures say besides: the types of the arguments, and which column `column` names."""
    hints = get_type_hints(function, include_extras=True)
    for name in hints.keys() & arguments.keys():
        try:
            TypeAdapter(hints[name]).validate_python(arguments[name], strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{field}.{name}: {said} (value {arguments[name]!r})") from None
    named = inspect.signature(function).parameters.get("column")
    if columns is None or named is None:
        return
    column = arguments.get("column", named.default)
    if column not in columns:
        raise ConfigError(
            f"{field}.column: {where} has no column {column!r} (it has: {_join_names(columns)}); name the "
            "one with the answer"
        )


def _join_names(columns: Collection[str]) -> str:
    return ", ".join(sorted(map(str, columns))) or "none"
