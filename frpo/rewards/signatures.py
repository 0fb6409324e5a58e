"""What a reward function takes, told from its signature: TRL's, verl's or OpenRLHF's parameters, by keyword.

The three shapes are described in `frpo.rewards.calling`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)
Shape = Literal["trl", "verl", "verl batch", "openrlhf"]

ALWAYS = frozenset(
    {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "messages",
        "task",
    }
)
"""Given to every function of TRL's shape, besides the columns."""
SOLUTIONS = ("solution_str", "predict_str", "model_output")
"""Names of the completion in verl's own graders."""
TRUTHS = ("ground_truth", "reward_model", "label", "answer")
"""Columns that verl's ground_truth is taken from, the first that is there."""
SCORED = frozenset(
    {"prompts", "completions", "completion_ids", "queries", "solution_str", "solution_strs", *SOLUTIONS}
)
"""What a function reads that scores: one that takes none of them may make a reward function."""


def reads_text(function: F) -> F:
    """Mark a function that reads the text of prompts and completions on chat rows too; `messages` holds the
    conversations."""
    function.reads_text = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Parameters:
    """What a function can be given by keyword."""

    names: frozenset[str]
    required: tuple[str, ...]
    rest: bool
    """Whether it takes any other name (**kwargs)."""

    def take(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the function takes of it."""
        return {name: value for name, value in given.items() if self.rest or name in self.names}


def parameters_of(function: Function) -> Parameters:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return Parameters(frozenset(), (), True)
    parameters = signature.parameters.values()
    names = set[str]()
    positional = list[str]()
    required = list[str]()
    rest = False
    for parameter in parameters:
        needed = parameter.default is parameter.empty
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names.add(parameter.name)
            if needed:
                required.append(parameter.name)
        elif parameter.kind is parameter.POSITIONAL_ONLY and needed:
            positional.append(f"{parameter.name}, /")
        elif parameter.kind is parameter.VAR_KEYWORD:
            rest = True
    return Parameters(frozenset(names), (*positional, *required), rest)


def calling_shape(names: Collection[str]) -> Shape:
    """Of a function whose parameters have these names.

    Example: {"data_source", "solution_str", "ground_truth"} is verl's, {"completions", "answer"} TRL's.
    """
    if "solution_strs" in names:
        return "verl batch"
    if not {"completions", "prompts"} & set(names) and any(name in names for name in SOLUTIONS):
        return "verl"
    if "queries" in names:
        return "openrlhf"
    return "trl"


def given_names(shape: Shape, columns: Collection[str]) -> set[str]:
    """What a function of this shape can be given on rows with these columns."""
    if shape == "trl":
        return {*ALWAYS, *columns}
    if shape == "openrlhf":
        return {"queries", "prompts", "labels", "messages"}
    verl = {"data_source", "extra_info", *SOLUTIONS}
    if any(name in columns for name in TRUTHS):
        verl.add("ground_truth")
    if shape == "verl":
        return verl
    return {"solution_strs", *(f"{name}s" for name in verl)}


def makes_the_function(function: Function, arguments: Mapping[str, Any]) -> bool:
    """Whether it is no reward function, but makes one of the arguments: a class, or a factory such as TRL's
    get_..._reward."""
    if isinstance(function, type):
        return True
    takes = parameters_of(function)
    scores = takes.rest or bool(takes.names & SCORED)
    return bool(arguments) and not scores and set(takes.required) <= set(arguments)


def make_function(function: Function, arguments: Mapping[str, Any]) -> tuple[Function, dict[str, Any]]:
    """The function, and the arguments of each call: those that a class or a factory names are given to it,
    once."""
    if not makes_the_function(function, arguments):
        return function, dict(arguments)
    names = parameters_of(function).names
    own = {name: value for name, value in arguments.items() if name in names}
    left = {name: value for name, value in arguments.items() if name not in names}
    return function(**own), left
