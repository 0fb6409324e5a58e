"""The answers of reward functions, waited for where they are async."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.Runner:
    """One for all calls of a process: clients that a function keeps are bound to it."""
    return asyncio.Runner()


def finish_one(answer: Any) -> Any:
    """The answer itself, or what it becomes where it has to be awaited."""
    if inspect.isawaitable(answer):
        return _event_loop().run(_wait_for(answer))
    return answer


async def _wait_for(answer: Awaitable[Any]) -> Any:
    return await answer


def finish_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The answers of separate calls, async ones side by side; an error in place of the answer of a call that
    raised it."""
    answers = [_try_call(call) for call in calls]
    waiting = [i for i, answer in enumerate(answers) if inspect.isawaitable(answer)]
    if waiting:
        awaited = _event_loop().run(_wait_for_all([answers[i] for i in waiting]))
        for i, answer in zip(waiting, awaited, strict=True):
            answers[i] = answer
    return answers


def _try_call(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # the user's code: the fault of one completion is not that of its group
        return error


async def _wait_for_all(answers: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*answers, return_exceptions=True)
