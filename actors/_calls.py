"""Calls of actors that may die and come back. Every wait has a limit and names whom it waits for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from frpo.config import ConfigError
from frpo.roles import WorkerFailed

T = TypeVar("T")

RESTART_LIMIT_S = 300.0
"""Longest wait for a killed actor to be back (a vLLM engine takes half a minute)."""


class Call(Generic[T]):
    """One call of one method, already submitted; implements roles.Pending.

    When the actor was restarted meanwhile `when_back` gives it back its state, and the call is submitted
    again, which its method must allow (idempotent).
    """

    def __init__(
        self,
        name: str,
        handle: ActorHandle[Any],
        method: str,
        args: tuple[Any, ...] = (),
        *,
        timeout_s: float,
        restarts: int = 0,
        when_back: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.handle, self.method, self.args = name, handle, method, args
        self.timeout_s, self.restarts, self.when_back = timeout_s, restarts, when_back
        self._ref = self._submit()

    def _submit(self) -> Any:
        return getattr(self.handle, self.method).remote(*self.args)

    def ready(self) -> bool:
        return bool(ray.wait([self._ref], timeout=0)[0])

    def result(self) -> T:
        """Raises WorkerFailed: the method raised, the actor died for good, or the time limit passed;
        ConfigError where the method did."""
        deadline = time.monotonic() + self.timeout_s
        for _ in range(self.restarts + 1):
            try:
                answer: T = ray.get(self._ref, timeout=max(0.1, deadline - time.monotonic()))
                return answer
            except GetTimeoutError:
                raise WorkerFailed(
                    f"{self.name} did not answer {self.method}() within {self.timeout_s:g} s."
                ) from None
            except RayTaskError as error:
                raise failed(self.name, self.method, error) from None
            except RayActorError as error:
                if isinstance(error, ActorDiedError) or not self.restarts:
                    raise died(self.name, self.method, error) from None
                wait_until_back(self.name, self.handle)
                self.when_back()
                self._ref = self._submit()
        raise WorkerFailed(
            f"{self.name} died {self.restarts + 1} times during {self.method}(); see cluster.max_restarts."
        )


def failed(name: str, method: str, error: RayTaskError) -> WorkerFailed | ConfigError:
    """The method raised: say what, without the remote traceback. A mistake of the user's stays one."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(cause, ConfigError):
        return ConfigError(str(cause))
    return WorkerFailed(f"{name} failed in {method}(): {type(cause).__name__}: {cause}")


def died(name: str, method: str, error: RayActorError) -> WorkerFailed:
    reason = " ".join(str(error).split())
    pid = re.search(r"pid[=: ]+(\d+)", reason)
    return WorkerFailed(
        f"{name} died during {method}(): {reason[:400]}{last_lines(int(pid[1])) if pid else ''}"
    )


def last_lines(pid: int, count: int = 5) -> str:
    """The last lines that a process of this node wrote to stderr, for the message; empty when there are none
    here."""
    logs = sorted(
        Path("/tmp/ray").glob(f"session_*/logs/worker-*-{pid}.err"), key=lambda p: p.stat().st_mtime
    )
    lines = logs[-1].read_text(errors="replace").strip().splitlines()[-count:] if logs else []
    return "\nIts last lines:\n" + "\n".join(f"  {line[:300]}" for line in lines) if lines else ""


def wait_until_back(name: str, handle: ActorHandle[Any]) -> None:
    """Wait for Ray to restart an actor. Raises WorkerFailed when it does not come back."""
    deadline, pause = time.monotonic() + RESTART_LIMIT_S, 0.2
    while True:
        try:
            ray.get(handle.ping.remote(), timeout=max(1.0, deadline - time.monotonic()))
            return
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise WorkerFailed(
                    f"{name} was killed and did not come back within {RESTART_LIMIT_S:g} s."
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
        except GetTimeoutError:
            raise WorkerFailed(
                f"{name} was killed and did not come back within {RESTART_LIMIT_S:g} s."
            ) from None
        except RayActorError as error:
            raise died(name, "restart", error) from None


def wait_all(calls: Sequence[Call[T]]) -> list[T]:
    return [call.result() for call in calls]


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


class Actors:
    """The handles of one role, with names for people and the limits of its calls."""

    def __init__(
        self, role: str, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int = 0
    ) -> None:
        self.role, self.handles, self.timeout_s, self.restarts = role, tuple(handles), timeout_s, restarts
        self.turn: Callable[[], None] = lambda: None
        """Called before each call: takes the GPU over where roles share one."""
        self.when_back: Callable[[], None] = lambda: None
        """Called when an actor was restarted, before it is called again."""

    def __len__(self) -> int:
        return len(self.handles)

    def name(self, index: int) -> str:
        return f"{self.role} worker {index}"

    def call(self, index: int, method: str, *args: Any) -> Call[Any]:
        self.turn()
        return Call(
            self.name(index),
            self.handles[index],
            method,
            args,
            timeout_s=self.timeout_s,
            restarts=self.restarts,
            when_back=self.when_back,
        )

    def beside(self, index: int, method: str, timeout_s: float) -> Call[Any]:
        """A call that needs no GPU, whoever has it."""
        return Call(self.name(index), self.handles[index], method, timeout_s=timeout_s)

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """The same call on every actor, side by side; the answers in order."""
        return wait_all([self.call(i, method, *args) for i in range(len(self))])

    def wait_until_ready(self, timeout_s: float) -> None:
        wait_all([Call(self.name(i), h, "ping", timeout_s=timeout_s) for i, h in enumerate(self.handles)])
