"""Reward functions in processes of their own: what takes too long is killed, with all that it started, and
computes no further.

Every process loads every function once, before its first call. A group is one call; when that fails, each
completion is tried by itself, so that only the one at fault loses its reward.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import SimpleNamespace
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from frpo.config import FunctionReward, RewardConfig
from frpo.rewards.calling import FunctionScorer
from frpo.rewards.loading import imports_of, load_function
from frpo.rewards.parts import Part, describe_error, part_of
from frpo.types import Item

PROCESSES = 3
"""Of an actor: when one is killed and another has the completion at fault, there is one left for the rest."""
POOL_MIB = 55
"""Memory of these processes and of the server that they are forked from, without what the functions of others
import."""
LOAD_LIMIT_S = 300.0
LEADER = "FRPO_REWARD_PROCESS"
"""Environment variable with the number of the process, for what it starts: that may leave its group
(start_new_session)."""
GRACE_S = 5.0
"""After a call's time limit, until its process ends itself, where nobody is left to kill it."""


def pool_processes(rewards: Sequence[RewardConfig]) -> int:
    """Processes that one reward actor starts."""
    has_functions = any(isinstance(reward, FunctionReward) for reward in rewards)
    return PROCESSES if has_functions else 0


# ---- in the process


@dataclass(frozen=True)
class Outcome:
    """Of one call."""

    parts: tuple[Part, ...] = ()
    """One per item; empty where the call failed as a whole."""
    why: str | None = None
    """Why it failed."""
    count: int | None = None
    """How many values it gave instead of one per item."""

    @property
    def num_values(self) -> int:
        return len(self.parts) or self.count or 0


SCORERS: dict[str, FunctionScorer] = {}
BROKEN: dict[str, str] = {}
"""What this process has loaded, and why it could not load the rest."""


def _load_all(
    rewards: Mapping[str, FunctionReward], environment: Mapping[str, str], born: Connection
) -> None:
    """Runs once in each process. It leads a group of processes, so that what it starts dies with it."""
    os.setsid()
    os.environ.update(environment)  # the server's is of the time when it started
    os.environ[LEADER] = str(os.getpid())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, even in C code that holds the interpreter
    for field, reward in rewards.items():
        try:
            SCORERS[reward.name] = FunctionScorer(reward, field)
            SCORERS[reward.name].warm()
        except BaseException as error:  # the user's code
            BROKEN[reward.name] = describe_error(error)
    born.send((os.getpid(), "; ".join(BROKEN.values())))


def _call_here(reward: FunctionReward, items: Sequence[Item], limit_s: float) -> Outcome:
    if reward.name in BROKEN:
        return Outcome(tuple((None, BROKEN[reward.name]) for _ in items))
    # needs no interpreter: ends this process even when its parent is gone and C code holds the lock
    faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=2)
    try:
        values = SCORERS[reward.name](items)
    except BaseException as error:  # also SystemExit of a careless function
        return Outcome(why=describe_error(error))
    finally:
        faulthandler.cancel_dump_traceback_later()
    if len(values) != len(items):
        return Outcome(why=f"gave {len(values)} values for {len(items)} completions", count=len(values))
    return Outcome(tuple(part_of(value, reward) for value in values))


# ---- in the actor

MAIN = threading.Lock()


class Process(ForkServerProcess):
    """Forked from a server that has imported this file and nothing else: not from the actor with its threads,
    and without importing the actor's __main__, which is Ray's, again."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        with MAIN:
            spec = main.__spec__
            main.__spec__ = SimpleNamespace(name="frpo.__main__")  # type: ignore[assignment]
            try:
                return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]
            finally:
                main.__spec__ = spec


class Context(ForkServerContext):
    Process = Process  # type: ignore[assignment]


CONTEXT = Context()


class Functions:
    """The processes of an actor or of a Serve replica. `rewards`: by the names of their fields."""

    def __init__(self, rewards: Mapping[str, FunctionReward], processes: int = PROCESSES) -> None:
        self.rewards = dict(rewards)
        self.processes = processes
        self.slots = threading.BoundedSemaphore(processes)
        """Calls that may be with a process: others wait here for their turn, their time limits not yet
        running."""
        self.lock = threading.Lock()
        self.pool: ProcessPool | None = None
        self.news, self.born = CONTEXT.Pipe(duplex=False)
        self.groups: set[int] = set()
        """Those of the processes that have loaded."""

    def load(self) -> None:
        """Start the processes and wait until each has loaded all functions. Raises RuntimeError naming what
        does not load."""
        names = ", ".join(reward.name for reward in self.rewards.values())
        pool = self._start()
        deadline = time.monotonic() + LOAD_LIMIT_S
        while len(self.groups) < self.processes:
            if errors := self._note_loaded(wait_s=0.1):
                raise RuntimeError(errors)
            if not pool.active:
                raise RuntimeError(
                    f"a process ended while it loaded the rewards {names}; see what it printed"
                )
            if time.monotonic() > deadline:
                self.close()
                raise RuntimeError(
                    f"the rewards {names} did not load within {LOAD_LIMIT_S:g} s: what do their files wait "
                    "for?"
                )

    def score(self, reward: FunctionReward, items: Sequence[Item]) -> list[Part]:
        """One part per item, in order, at most about twice the reward's time limit after a process is
        free."""
        (whole,) = self._call_all(reward, [items])
        if whole.parts:
            return list(whole.parts)
        if len(items) == 1:
            return [(None, whole.why)]
        alone = self._call_all(reward, [[item] for item in items])
        if whole.count is not None and sum(call.num_values for call in alone) != whole.count:
            return [(None, whole.why)] * len(items)  # its values are not those of single completions
        return [call.parts[0] if call.parts else (None, call.why) for call in alone]

    def close(self) -> None:
        """Kill the processes and all that they started."""
        with self.lock:
            if self.pool is not None:
                _stop_pool(self.pool)
            self.pool = None
        self._kill_left_behind()

    def _call_all(self, reward: FunctionReward, batches: Sequence[Sequence[Item]]) -> list[Outcome]:
        """Of one call per batch, side by side. Together they take about the reward's time limit: each may
        take its fair share of what those before it left."""
        deadline = time.monotonic() + reward.timeout_s
        calls = []
        for done, batch in enumerate(batches):
            self.slots.acquire()
            share = min(1.0, self.processes / (len(batches) - done)) * (deadline - time.monotonic())
            limit_s = max(share, reward.timeout_s / len(batches))
            calls.append((batch, self._call(reward, batch, limit_s), limit_s))
        return [self._answer(reward, *call) for call in calls]

    def _answer(
        self, reward: FunctionReward, batch: Sequence[Item], future: ProcessFuture[Outcome], limit_s: float
    ) -> Outcome:
        """Of a call; of a second one where the first came to processes one of which had ended idle."""
        with suppress(BrokenProcessPool):
            return self._wait_for(reward, future, limit_s)
        self.slots.acquire()
        try:
            return self._wait_for(reward, self._call(reward, batch, limit_s), limit_s)
        except BrokenProcessPool as error:
            return Outcome(why=describe_error(error))

    def _call(self, reward: FunctionReward, items: Sequence[Item], limit_s: float) -> ProcessFuture[Outcome]:
        future = self._start().schedule(_call_here, (reward, list(items), limit_s), timeout=limit_s)
        future.add_done_callback(lambda _: self.slots.release())
        return future

    def _wait_for(self, reward: FunctionReward, future: ProcessFuture[Outcome], limit_s: float) -> Outcome:
        """Raises BrokenProcessPool where the pool broke before it answered."""
        try:
            # it may have to load first, where another was killed
            return future.result(timeout=limit_s + LOAD_LIMIT_S)
        except TimeoutError:
            if not future.done():
                future.cancel()
                return Outcome(why=f"no process had loaded the function within {LOAD_LIMIT_S:g} s")
            self._kill_left_behind()
            return Outcome(why=f"took longer than {reward.timeout_s:g} s (rewards.{reward.name}.timeout_s)")
        except ProcessExpired as error:
            self._kill_left_behind()
            return Outcome(why=f"its process ended ({describe_ending(error.exitcode)})")
        except BrokenProcessPool:
            raise
        except BaseException as error:  # such as a column that cannot be sent
            return Outcome(why=describe_error(error))

    def _start(self) -> ProcessPool:
        """The processes, started where none run."""
        with self.lock:
            if self.pool is None or not self.pool.active:
                CONTEXT.set_forkserver_preload([__name__, *ready_made_imports(self.rewards.values())])
                given = (self.rewards, dict(os.environ), self.born)
                self.pool = ProcessPool(
                    self.processes, initializer=_load_all, initargs=given, context=CONTEXT
                )
                weakref.finalize(self, _stop_pool, self.pool)
                assert self.pool.active  # asking starts it
            return self.pool

    def _note_loaded(self, wait_s: float) -> str:
        """Take note of the processes that have loaded since; returns what they could not load."""
        errors = []
        with self.lock:
            while self.news.poll(wait_s):
                pid, error = self.news.recv()
                self.groups.add(pid)
                if error:
                    errors.append(error)
                wait_s = 0.0
        return "; ".join(errors)

    def _kill_left_behind(self) -> None:
        """Kill what processes that ended have left behind."""
        self._note_loaded(wait_s=0.0)
        with self.lock:
            ended = {pid for pid in self.groups if not _is_running(pid)}
            self.groups -= ended
        for pid in ended:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if ended:
            kill_strays(ended)


def ready_made_imports(rewards: Iterable[FunctionReward]) -> list[str]:
    """What our own functions import, once for all processes; what others import is theirs, and may not like
    to be forked."""
    modules = list[str]()
    for reward in rewards:
        if reward.function.startswith("frpo.rewards"):
            modules += imports_of(load_function(reward.function))
    return modules


def _stop_pool(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def kill_strays(leaders: Collection[int]) -> None:
    """Kill what those processes have started and is no longer of their groups, found by its environment."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile, or somebody else's
            if process.environ().get(LEADER) in map(str, leaders):
                process.kill()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def describe_ending(code: int | None) -> str:
    """How a process ended, for people."""
    if code is None or code >= 0:
        return f"exit code {code}"
    if -code == signal.SIGKILL:
        return "SIGKILL, maybe out of memory"
    return signal.Signals(-code).name
