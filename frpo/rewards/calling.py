"""How reward functions are called: as TRL, verl and OpenRLHF call theirs, told apart by the names of their
parameters.

TRL:      f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> one
value per completion verl:     compute_score(data_source, solution_str, ground_truth, extra_info) -> a number,
or a dict with "score"
          compute_score(data_sources, solution_strs, ground_truths, extra_infos) -> a list of either
OpenRLHF: reward_func(queries, prompts, labels) -> tensor or list, or a dict with "rewards"; one completion at
a time

Always by keyword, and a function without **kwargs gets only what it names. Each may be a plain or an async
function, a partial, a callable object, or a class, which is made once.
https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function,
https://verl.readthedocs.io/en/latest/preparation/reward_function.html, OpenRLHF/README.md (Reinforced
fine-tuning).
"""

from __future__ import annotations

import asyncio
import dis
import importlib
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from frpo.config import ConfigError, FunctionReward
from frpo.rewards.loading import load_function
from frpo.rewards.parts import values_of
from frpo.types import Item

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)
Shape = Literal["trl", "verl", "verl batch", "openrlhf"]

ALWAYS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "messages",
    "task",
)
"""Given to every function of TRL's shape, besides the columns."""
SOLUTIONS = ("solution_str", "predict_str", "model_output")
"""Names of the completion in verl's own graders."""
TRUTHS = ("ground_truth", "reward_model", "label", "answer")
"""Columns that verl's ground_truth is taken from, the first that is there."""
LABELS = ("label", "answer")
"""The same for OpenRLHF's labels."""


@dataclass(frozen=True)
class TrainerState:
    """What TRL's functions read of the trainer's state."""

    global_step: int
    """Updates that the policy had seen."""


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


def reads_text(function: F) -> F:
    """Mark a function that reads the text of prompts and completions on chat rows too; `messages` holds the
    conversations."""
    function.reads_text = True  # type: ignore[attr-defined]
    return function


# ---- signatures


@dataclass(frozen=True)
class Parameters:
    """What a function can be given by keyword."""

    names: frozenset[str]
    required: tuple[str, ...]
    rest: bool
    """Whether it takes any other name (**kwargs)."""

    def of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the function takes of it."""
        return {name: value for name, value in given.items() if self.rest or name in self.names}


def parameters(function: Function) -> Parameters:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return Parameters(frozenset(), (), True)
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [f"{p.name}, /" for p in found if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    required = [p.name for p in named if p.default is p.empty]
    return Parameters(
        frozenset(p.name for p in named),
        (*positional, *required),
        any(p.kind is p.VAR_KEYWORD for p in found),
    )


def shape_of(names: Collection[str]) -> Shape:
    if "solution_strs" in names:
        return "verl batch"
    if not {"completions", "prompts"} & set(names) and any(name in names for name in SOLUTIONS):
        return "verl"
    return "openrlhf" if "queries" in names else "trl"


def given_names(shape: Shape, columns: Collection[str]) -> set[str]:
    """What a function of this shape can be given on rows with these columns."""
    if shape == "trl":
        return {*ALWAYS, *columns}
    if shape == "openrlhf":
        return {"queries", "prompts", "labels", "messages"}
    verl = {"data_source", "extra_info", *SOLUTIONS}
    verl |= {"ground_truth"} if any(name in columns for name in TRUTHS) else set()
    return verl if shape == "verl" else {"solution_strs", *(f"{name}s" for name in verl)}


def makes_the_function(function: Function, arguments: Mapping[str, Any]) -> bool:
    """Whether it is no reward function, but makes one of the arguments: a class, or a factory such as TRL's
    get_..._reward."""
    takes = parameters(function)
    reads = takes.names & {"prompts", "completions", "completion_ids", "queries", *SOLUTIONS, "solution_strs"}
    factory = bool(arguments) and not reads and not takes.rest and set(takes.required) <= set(arguments)
    return isinstance(function, type) or factory


def made(function: Function, arguments: Mapping[str, Any]) -> tuple[Function, dict[str, Any]]:
    """The function, and the arguments of each call: those that a class or a factory names are given to it,
    once."""
    if not makes_the_function(function, arguments):
        return function, dict(arguments)
    own = parameters(function).names & set(arguments)
    return function(**{name: arguments[name] for name in own}), {
        n: v for n, v in arguments.items() if n not in own
    }


def check_signature(
    reward: FunctionReward, columns: Collection[str] | None, field: str, where: str = "a row"
) -> None:
    """That a call binds on rows with these columns (None: not known yet). Raises ConfigError naming
    parameter, function and remedy."""
    function, arguments = load_function(reward.function, f"{field}.function"), dict(reward.arguments)
    own: frozenset[str] = frozenset()
    if makes_the_function(function, arguments):  # not made here: it may load a model
        own = parameters(function).names
        if not isinstance(function, type):
            return
        if absent := [name for name in parameters(function).required if name not in arguments]:
            raise ConfigError(
                f"{field}.function: the class {reward.function} asks for {absent[0]!r}; give it in "
                f"{field}.arguments"
            )
        call = next((vars(c)["__call__"] for c in function.__mro__ if "__call__" in vars(c)), None)
        if not inspect.isfunction(call):
            raise ConfigError(
                f"{field}.function: instances of the class {reward.function} cannot be called; give it a "
                "__call__"
            )
        function = partial(call, None)  # bound to nobody: for its signature
    takes = parameters(function)
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
    shape = shape_of(takes.names)
    # a ready-made function lets **_ take columns, never a misspelt argument
    takes_any = takes.rest and (
        not hasattr(function, "reads_text") or "columns" in inspect.signature(function).parameters
    )
    for name in set(arguments) - own:
        if name in RUNS_OWN:
            raise ConfigError(
                f"{field}.arguments.{name}: the run itself gives this to {reward.function}; leave it out"
            )
        if name not in takes.names and not takes_any:
            known = ", ".join(sorted(takes.names - given_names(shape, columns or ()))) or "none"
            raise ConfigError(
                f"{field}.arguments.{name}: {reward.function} takes no such argument; it takes: {known}"
            )
    if str(getattr(function, "__module__", "")).startswith("frpo."):
        check_ready_made(function, arguments, columns, f"{field}.arguments", where)
    if columns is None:
        return
    missing = [name for name in takes.required if name not in {*given_names(shape, columns), *arguments}]
    if missing:
        have = ", ".join(sorted(map(str, columns))) or "none"
        raise ConfigError(
            f"{field}.function: {reward.function} asks for {missing[0]!r}, and {where} has no such column "
            f"(it has: {have}). "
            f"Functions are called by keyword, this one as in {shape}: rename its parameter or the column, "
            f"or give {field}.arguments"
        )


def check_ready_made(
    function: Function, arguments: Mapping[str, Any], columns: Collection[str] | None, field: str, where: str
) -> None:
    """What our own signatures say besides: the types of the arguments, and which column `column` names.
    Raises ConfigError."""
    hints = get_type_hints(function, include_extras=True)
    for name in hints.keys() & arguments.keys():
        try:
            TypeAdapter(hints[name]).validate_python(arguments[name], strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{field}.{name}: {said} (value {arguments[name]!r})") from None
    if columns is not None and (named := inspect.signature(function).parameters.get("column")):
        column = arguments.get("column", named.default)
        if column not in columns:
            have = ", ".join(sorted(map(str, columns))) or "none"
            raise ConfigError(
                f"{field}.column: {where} has no column {column!r} (it has: {have}); name the one with the "
                "answer"
            )


# ---- calls


class FunctionScorer:
    """A reward function of any shape, called with items. Raises ConfigError when it does not resolve, and
    whatever its class raises."""

    def __init__(self, reward: FunctionReward, field: str) -> None:
        self.function, self.arguments = made(
            load_function(reward.function, f"{field}.function"), reward.arguments
        )
        self.takes = parameters(self.function)
        self.shape = shape_of(self.takes.names)

    def warm(self) -> None:
        """Import what the function's body imports, so that no call's time limit counts it."""
        for name in imports_of(self.function):
            with suppress(Exception):  # maybe never reached: the call will say
                importlib.import_module(name)

    def __call__(self, items: Sequence[Item]) -> list[Any]:
        """One value per item: what part_of reads."""
        if self.shape == "trl":
            return self._trl(items)
        if self.shape == "verl batch":
            rows = [verl_row(item, "solution_str") for item in items]
            answers = values_of(
                finished(self._call({f"{name}s": [row[name] for row in rows] for name in rows[0]})),
                len(items),
            )
        elif self.shape == "verl":
            solution = next(name for name in SOLUTIONS if name in self.takes.names)
            answers = finished_all([partial(self._call, verl_row(item, solution)) for item in items])
        else:
            answers = finished_all([partial(self._call, openrlhf_row(item)) for item in items])
        return [_inner(answer, "rewards" if self.shape == "openrlhf" else "score") for answer in answers]

    def _call(self, given: Mapping[str, Any]) -> Any:
        return self.function(**self.takes.of({**given, **self.arguments}))

    def _trl(self, items: Sequence[Item]) -> list[Any]:
        given = trl_call(items, text=hasattr(self.function, "reads_text"))
        if "completion_ids" not in given and "completion_ids" in self.takes.required:
            raise ValueError("completion_ids: the caller sent text, without token ids")
        return values_of(finished(self._call(given)), len(items))


def trl_call(items: Sequence[Item], *, text: bool) -> dict[str, Any]:
    """Keyword arguments of a call in TRL's shape; `text` asks for strings where the rows are chat."""
    names = {name for item in items for name in item.columns}
    given: dict[str, Any] = {"task": [item.task for item in items]}
    given |= {name: [item.columns.get(name) for item in items] for name in sorted(names)}
    if text or "messages" not in given:
        given["messages"] = [conversation(item) for item in items]
    chat = [item.conversational and not text for item in items]
    given["prompts"] = [conversation(item) if c else item.prompt for item, c in zip(items, chat, strict=True)]
    given["completions"] = [
        [{"role": "assistant", "content": item.completion}] if c else item.completion
        for item, c in zip(items, chat, strict=True)
    ]
    given.pop("completion_ids", None)
    if all(item.completion_ids is not None for item in items):
        given["completion_ids"] = [list(item.completion_ids or ()) for item in items]
    return given | {
        "trainer_state": TrainerState(items[0].step),
        "log_extra": _dropped,
        "log_metric": _dropped,
    }


def conversation(item: Item) -> list[dict[str, str]]:
    """The messages before the completion; a plain string is one user message."""
    return [dict(m) for m in item.messages] or [{"role": "user", "content": item.prompt}]


def _dropped(*_: Any, **__: Any) -> None:
    """log_extra and log_metric: our metrics hold the parts of the reward alone."""


def verl_row(item: Item, solution: str) -> dict[str, Any]:
    """Keyword arguments for one completion, which is called `solution`."""
    extra = item.columns.get("extra_info")
    told = dict(extra) if isinstance(extra, Mapping) else {}
    return {
        "data_source": item.columns.get("data_source", item.task),
        solution: item.completion,
        "ground_truth": _truth(item.columns),
        "extra_info": {
            **told,
            "num_turns": None,
            "rollout_reward_scores": {},
        },  # as verl's reward managers add them
    }


def _truth(columns: Mapping[str, Any]) -> Any:
    for name in TRUTHS:
        if (found := columns.get(name)) is not None:
            return (
                found.get("ground_truth") if name == "reward_model" and isinstance(found, Mapping) else found
            )
    return None


def openrlhf_row(item: Item) -> dict[str, Any]:
    label = next((item.columns[name] for name in LABELS if item.columns.get(name) is not None), None)
    told = {"messages": [conversation(item)]} if item.messages else {}
    return {"queries": [item.prompt + item.completion], "prompts": [item.prompt], "labels": [label], **told}


def _inner(answer: Any, key: str) -> Any:
    if not isinstance(answer, Mapping):
        return answer
    return answer[key] if key in answer else KeyError(key)


# ---- async


@lru_cache(maxsize=1)
def _runner() -> asyncio.Runner:
    """One event loop for all calls of a process: clients that a function keeps are bound to it."""
    return asyncio.Runner()


def finished(answer: Any) -> Any:
    return _runner().run(_awaited(answer)) if inspect.isawaitable(answer) else answer


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def finished_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The answers of separate calls, async ones side by side; an error in place of the answer of a call that
    raised it."""
    answers = [_tried(call) for call in calls]
    waiting = [i for i, answer in enumerate(answers) if inspect.isawaitable(answer)]
    if waiting:
        for i, answer in zip(waiting, _runner().run(_gathered([answers[i] for i in waiting])), strict=True):
            answers[i] = answer
    return answers


def _tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # the user's code: the fault of one completion is not that of its group
        return error


async def _gathered(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)


def imports_of(function: Function) -> list[str]:
    """Absolute names of the modules that the body of a function, or of an object's __call__, imports."""
    while isinstance(function, partial):
        function = function.func
    body = inspect.unwrap(function) if inspect.isroutine(function) else type(function).__call__
    code = getattr(body, "__code__", None)
    if code is None:
        return []
    steps = list(dis.get_instructions(code))
    # IMPORT_NAME follows the level, two constants earlier: 0 for an absolute import
    return [
        s.argval
        for i, s in enumerate(steps)
        if s.opname == "IMPORT_NAME" and i > 1 and steps[i - 2].argval == 0
    ]
