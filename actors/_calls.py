"""Calls of actors that may die and come back. Every wait has a limit and names whom it waits for.

A call names the method of the worker's class, so that mypy sees through the boundary of the process: a wrong
name, a wrong argument and a wrong use of the answer are errors where the call stands. Ray's own
`ActorHandle[W]` has the methods of decorated classes alone, and `Never` for all others.

    calls: Actors[LearnerWorker]
    calls.call(0, LearnerWorker.export, "folder", True)     # a RemoteCall[None]
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from frpo.config import ConfigError
from frpo.joining import name_temporary_folder
from frpo.roles import WorkerFailed

logger = logging.getLogger("frpo")
"""What it says lands in run.log."""

GRACE_S = 5.0
"""Longest wait, when a call has failed, for what others have to say."""
RESTART_LIMIT_S = 300.0
"""Longest wait for a killed actor to be back (a vLLM engine takes half a minute)."""
GONE = (RayActorError, ObjectLostError)
"""What a call ends in whose process died, or whose answer lay in the object store of a node that did."""


class StartedAnew(RuntimeError):
    """The worker lacks what it was given: Ray has restarted it since, while nobody asked it for anything."""


class LostWithOwner(WorkerFailed):
    """What the call was given lay in the object store of a process that died."""


class ProcessId(NamedTuple):
    """Two nodes may give the same number."""

    node: str
    pid: int


def this_process() -> ProcessId:
    return ProcessId(platform.node(), os.getpid())


class Worker(Protocol):
    """What the class of every actor has."""

    def ping(self) -> Any:
        """Answers, with its process, as soon as it can work."""
        ...


T = TypeVar("T")
W = TypeVar("W", bound=Worker)
P = ParamSpec("P")


@dataclass(frozen=True)
class Request(Generic[T]):
    """A method, by its name, and what it is given."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def submit(self, handle: ActorHandle[Any]) -> ObjectRef[T]:
        reference: ObjectRef[T] = getattr(handle, self.method).remote(*self.args, **self.kwargs)
        return reference


class RemoteCall(Generic[T]):
    """One call of one method, already submitted; implements roles.Pending.

    When the actor was restarted meanwhile `when_back` gives it back its state, and the call is submitted
    again, which its method must allow (idempotent).
    """

    def __init__(
        self,
        name: str,
        handle: ActorHandle[Any],
        request: Request[T],
        *,
        timeout_s: float,
        restarts: int = 0,
        when_back: Callable[[], object] = lambda: None,
        died: Callable[[str], WorkerFailed] = WorkerFailed,
    ) -> None:
        self.name, self.handle, self.request = name, handle, request
        self.timeout_s, self.restarts, self.when_back, self.died = timeout_s, restarts, when_back, died
        self._reference = request.submit(handle)

    def future(self) -> Future[T]:
        """Of this very call, which is not submitted again in it."""
        future: Future[T] = self._reference.future()  # type: ignore[attr-defined]
        return future

    def ready(self) -> bool:
        return bool(ray.wait([self._reference], timeout=0)[0])

    def result(self, left_s: float | None = None) -> T:
        """`left_s`: of the time limit, where it has been waited for already. Raises WorkerFailed: the method
        raised, the actor died for good, or the time limit passed; ConfigError where the method did."""
        method = self.request.method
        deadline = time.monotonic() + (self.timeout_s if left_s is None else left_s)
        for _ in range(self.restarts + 1):
            try:
                return ray.get(self._reference, timeout=max(0.1, deadline - time.monotonic()))
            except GetTimeoutError:
                raise WorkerFailed(
                    f"{self.name} did not answer {method}() within {self.timeout_s:g} s."
                ) from None
            except RayTaskError as error:
                if not isinstance(error.cause, StartedAnew):
                    raise failure_of(self.name, method, error) from None
                if not self.restarts:
                    raise self.died(f"{self.name} died before {method}().") from None
                logger.warning("%s was killed before %s()", self.name, method)
            except GONE as error:
                if isinstance(error, ActorDiedError) or not self.restarts:
                    raise self.died(tell_death(self.name, method, error)) from None
                logger.warning("%s was killed during %s(); waiting until it is back", self.name, method)
                wait_until_back(self.name, self.handle)
            self.when_back()
            self._reference = self.request.submit(self.handle)
        raise WorkerFailed(
            f"{self.name} died {self.restarts + 1} times during {method}(); see cluster.max_restarts."
        )


def failure_of(name: str, method: str, error: RayTaskError) -> WorkerFailed | ConfigError:
    """The method raised: say what, without the remote traceback. A mistake of the user's stays one."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(cause, ConfigError):
        return ConfigError(str(cause))
    if isinstance(cause, ObjectLostError):
        return LostWithOwner(f"{name} found in {method}() that what it was given is lost: its owner died.")
    return WorkerFailed(f"{name} failed in {method}(): {type(cause).__name__}: {cause}")


def tell_death(name: str, method: str, error: RayError) -> str:
    reason = " ".join(str(error).split())
    message = f"{name} died during {method}(): {reason[:400]}"
    pid = re.search(r"pid[=: ]+(\d+)", reason)
    return message + last_lines(int(pid[1])) if pid else message


def last_lines(pid: int, count: int = 5) -> str:
    """The last lines that a process of this node wrote to stderr, for the message; empty when there are none
    here."""
    logs: list[Path] = []
    for folder in {name_temporary_folder(), Path("/tmp/ray")}:  # started by a run, or by an operator
        logs += folder.glob(f"session_*/logs/worker-*-{pid}.err")
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    lines = newest.read_text(errors="replace").strip().splitlines()[-count:]
    return "".join(["\nIts last lines:", *(f"\n  {line[:300]}" for line in lines)]) if lines else ""


def wait_until_back(name: str, handle: ActorHandle[Any], other_than: ProcessId | None = None) -> ProcessId:
    """Wait for Ray to restart an actor, whose process was `other_than`: one that was just told to end still
    answers. The new one. Raises WorkerFailed when it does not come back."""
    deadline = time.monotonic() + RESTART_LIMIT_S
    pause = 0.2
    ping: Request[ProcessId] = Request("ping")
    while time.monotonic() < deadline:
        try:
            process = ray.get(ping.submit(handle), timeout=max(1.0, deadline - time.monotonic()))
            if process != other_than:
                return process
        except ActorUnavailableError:
            pass
        except GetTimeoutError:
            break
        except RayActorError as error:
            raise WorkerFailed(tell_death(name, "restart", error)) from None
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
    raise WorkerFailed(f"{name} was killed and did not come back within {RESTART_LIMIT_S:g} s.")


def wait_all(calls: Sequence[RemoteCall[T]]) -> list[T]:
    """Their answers in order. The first that fails ends the wait, for others may wait for it in vain; where
    one has died that is what is raised, for others fail when they miss it."""
    if not calls:
        return []
    deadline = time.monotonic() + calls[0].timeout_s
    if len(calls) > 1:
        futures = [call.future() for call in calls]
        wait(futures, timeout=calls[0].timeout_s, return_when=FIRST_EXCEPTION)
        failed = [call for call, future in zip(calls, futures, strict=True) if has_failed(future)]
        if failed:
            wait(futures, timeout=GRACE_S)
            for call, future in zip(calls, futures, strict=True):
                if has_failed(future) and is_death(future.exception()):
                    call.result()
            failed[0].result()
    return [call.result(max(0.0, deadline - time.monotonic())) for call in calls]


def has_failed(future: Future[Any]) -> bool:
    return future.done() and future.exception() is not None


def is_death(error: BaseException | None) -> bool:
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, StartedAnew)
    return isinstance(error, GONE)


def put_once(value: T) -> T:
    """An argument for calls of several actors, in the object store once instead of once a call.

    Ray gives a method the value of each reference among its arguments, so a call takes the reference as what
    the method takes: this is the one place where the two are taken for each other.
    """
    return cast(T, ray.put(value))


class Turns:
    """Roles that share one GPU and hold its memory in turn."""

    def __init__(
        self, first: str, release: Mapping[str, Callable[[], None]], acquire: Mapping[str, Callable[[], None]]
    ) -> None:
        self.holder, self.release, self.acquire = first, release, acquire
        self.changing = False

    def take(self, role: str) -> None:
        """Make `role` the holder: whoever holds the memory lets it go first. Both are called for that, which
        is no turn of theirs."""
        if role == self.holder or self.changing:
            return
        self.changing = True
        try:
            self.release[self.holder]()
            self.acquire[role]()
            self.holder = role
        finally:
            self.changing = False


class Actors(Generic[W]):
    """The handles of one role, with names for people and the limits of its calls."""

    def __init__(
        self, role: str, handles: Sequence[ActorHandle[W]], *, timeout_s: float, restarts: int = 0
    ) -> None:
        self.role, self.handles, self.timeout_s, self.restarts = role, tuple(handles), timeout_s, restarts
        self.turn: Callable[[], None] = lambda: None
        """Called before each call: takes the GPU over where roles share one."""
        self.when_back: Callable[[int], object] = lambda _: None
        """Called with the index of an actor that was restarted, before it is called again."""
        self.died: Callable[[str], WorkerFailed] = WorkerFailed
        """What the death of one that is not called again is."""

    def __len__(self) -> int:
        return len(self.handles)

    def name(self, index: int) -> str:
        return f"{self.role} worker {index}"

    def call(
        self, index: int, method: Callable[Concatenate[W, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> RemoteCall[T]:
        return self._call(index, Request(method.__name__, args, kwargs))

    def call_async(
        self,
        index: int,
        method: Callable[Concatenate[W, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> RemoteCall[T]:
        """Of a method that is a coroutine, which Ray awaits there."""
        return self._call(index, Request(method.__name__, args, kwargs))

    def _call(self, index: int, request: Request[T]) -> RemoteCall[T]:
        self.turn()
        return RemoteCall(
            self.name(index),
            self.handles[index],
            request,
            timeout_s=self.timeout_s,
            restarts=self.restarts,
            when_back=partial(self.when_back, index),
            died=self.died,
        )

    def call_beside(self, index: int, method: Callable[[W], T], timeout_s: float) -> RemoteCall[T]:
        """A call that needs no GPU, whoever has it."""
        return RemoteCall(
            self.name(index),
            self.handles[index],
            Request(method.__name__),
            timeout_s=timeout_s,
            died=self.died,
        )

    def submit(
        self,
        index: int,
        method: Callable[Concatenate[W, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> ObjectRef[T]:
        """The bare answer of a coroutine. Takes no turn and is not submitted again."""
        return Request[T](method.__name__, args, kwargs).submit(self.handles[index])

    def stream(
        self,
        index: int,
        method: Callable[Concatenate[W, P], AsyncIterator[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Iterator[ObjectRef[T]]:
        """What a generator yields there, one by one; `ray.wait` takes the iterator too. Takes no turn and is
        not submitted again."""
        generator: Any = getattr(self.handles[index], method.__name__)
        stream: Iterator[ObjectRef[T]] = generator.options(num_returns="streaming").remote(*args, **kwargs)
        return stream

    def submit_all(
        self, method: Callable[Concatenate[W, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[RemoteCall[T]]:
        """The same call on every actor, side by side."""
        return [self.call(i, method, *args, **kwargs) for i in range(len(self))]

    def call_all(self, method: Callable[Concatenate[W, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """The same, and their answers in order."""
        return wait_all(self.submit_all(method, *args, **kwargs))

    def wait_until_ready(self, timeout_s: float) -> None:
        ping: Request[Any] = Request("ping")
        calls = [
            RemoteCall(self.name(i), handle, ping, timeout_s=timeout_s)
            for i, handle in enumerate(self.handles)
        ]
        wait_all(calls)
