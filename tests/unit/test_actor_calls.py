"""Calls of actors that die, come back, fail or do not answer, on a Ray that gives what it is told to."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayTaskError,
)

from frpo.actors import _calls
from frpo.actors._calls import Actors, ProcessId, StartedAnew, last_lines, wait_until_back
from frpo.config import ConfigError
from frpo.roles import RankDied, WorkerFailed

KILLED = ActorUnavailableError("killed", b"0" * 16)
LOST_ANSWER = ObjectLostError("a0", "its owner", "")
"""It lay in the object store of a node that died."""
PONG = ProcessId("here", 5)


class Adder:
    def ping(self) -> ProcessId:
        return PONG

    def add(self, left: int, right: int = 1) -> int:
        return left + right


class Reference:
    """To an answer, or the error that the call ends in; None: it does not end."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.ended = answer, Future[Any]()
        if isinstance(answer, Exception):
            self.ended.set_exception(answer)
        elif answer is not None:
            self.ended.set_result(answer)

    def future(self) -> Future[Any]:
        return self.ended


class FakeRay:
    def get(self, reference: Reference, timeout: float) -> Any:
        if isinstance(reference.answer, Exception):
            raise reference.answer
        return reference.answer


class Handle:
    """Answers one call after the other, whatever is asked, and keeps what was."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._answer, method))

    def _answer(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((method, *args, *kwargs.items()))
        return Reference(self.answers.pop(0))


@pytest.fixture(autouse=True)
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "ray", FakeRay())


def adders(*handles: Any, restarts: int = 0) -> Actors[Adder]:
    return Actors("adder", handles, timeout_s=2, restarts=restarts)


def test_all_are_asked_for_the_method_that_is_named_and_answer_in_order() -> None:
    first, second = Handle(5), Handle(6)
    assert adders(first, second).call_all(Adder.add, 2, right=3) == [5, 6]
    assert first.asked == second.asked == [("add", 2, ("right", 3))]


@pytest.mark.parametrize("death", [KILLED, LOST_ANSWER])
def test_an_actor_that_came_back_has_its_state_again_before_it_is_asked_again(death: Exception) -> None:
    handle = Handle(death, PONG, 5)
    actors = adders(handle, restarts=1)
    actors.when_back = lambda worker: handle.asked.append(f"worker {worker} is back")
    assert actors.call(0, Adder.add, 2).result() == 5
    assert handle.asked == [("add", 2), ("ping",), "worker 0 is back", ("add", 2)]


def test_calls_that_go_together_share_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeRay):
        def get(self, reference: Reference, timeout: float) -> Any:
            left.append(timeout)
            raise GetTimeoutError

    left: list[float] = []
    monkeypatch.setattr(_calls, "ray", Silent())
    actors: Actors[Adder] = Actors("adder", [Handle(None), Handle(None)], timeout_s=0.5)  # type: ignore[list-item]
    with pytest.raises(WorkerFailed, match=r"^adder worker 0 did not answer add\(\) within 0\.5 s\.$"):
        actors.call_all(Adder.add, 2)
    assert left == [0.1]  # all of it has been waited for


def test_one_that_never_ends_is_given_up_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "RESTART_LIMIT_S", 0.5)
    with pytest.raises(WorkerFailed, match=r"^adder was killed and did not come back within 0\.5 s\.$"):
        wait_until_back("adder", Handle(PONG, PONG, PONG), other_than=PONG)
    assert wait_until_back("adder", Handle(PONG), other_than=ProcessId("there", PONG.pid)) == PONG


ANEW = RayTaskError("add", "traceback", StartedAnew("no rank of a job"))


def test_an_actor_that_was_restarted_while_nobody_asked_gets_its_state_before_it_answers() -> None:
    handle = Handle(ANEW, 5)
    actors = adders(handle, restarts=1)
    actors.when_back = lambda worker: handle.asked.append(f"worker {worker} is back")
    assert actors.call(0, Adder.add, 2).result() == 5
    assert handle.asked == [("add", 2), "worker 0 is back", ("add", 2)]


@pytest.mark.parametrize(
    ("answers", "restarts", "said"),
    [
        ([KILLED], 0, "adder worker 0 died during add(): The actor"),
        ([LOST_ANSWER], 0, "adder worker 0 died during add(): Failed to retrieve object a0"),
        ([ActorDiedError()], 3, "adder worker 0 died during add(): The actor died unexpectedly"),
        ([KILLED, PONG, KILLED, PONG, 5], 1, "adder worker 0 died 2 times during add(); see cluster."),
        ([KILLED, ActorDiedError()], 1, "adder worker 0 died during restart(): The actor died unexpectedly"),
        ([ANEW], 0, "adder worker 0 died before add()."),
        ([GetTimeoutError()], 3, "adder worker 0 did not answer add() within 2 s."),
        ([RayTaskError("add", "at", ValueError("odd"))], 1, "adder worker 0 failed in add(): ValueError"),
    ],
)  # fmt: skip
def test_who_failed_and_in_what_is_said(answers: list[Any], restarts: int, said: str) -> None:
    call = adders(Handle(*answers), restarts=restarts).call(0, Adder.add, 2)
    with pytest.raises(WorkerFailed) as error:
        call.result()
    assert str(error.value).startswith(said)


LOST = RayTaskError("add", "traceback", RuntimeError("connection closed by peer"))


@pytest.mark.parametrize("answers", [(LOST, KILLED), (KILLED, LOST), (None, KILLED), (LOST, LOST, ANEW)])
def test_of_calls_that_go_together_the_one_that_died_is_named_and_nobody_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(_calls, "GRACE_S", 0.01)
    actors = adders(*map(Handle, answers))
    actors.died = partial(RankDied, "learner")
    dead = next(i for i, answer in enumerate(answers) if answer in (KILLED, ANEW))
    with pytest.raises(RankDied, match=rf"adder worker {dead} died (during|before) add\(\)") as error:
        actors.call_all(Adder.add, 2)
    assert error.value.job == "learner"


def test_a_failure_of_one_is_told_without_waiting_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "GRACE_S", 0.01)
    with pytest.raises(WorkerFailed, match="adder worker 1 failed in add"):
        adders(Handle(None), Handle(LOST)).call_all(Adder.add, 2)


def test_a_mistake_of_the_users_stays_one() -> None:
    mistake = RayTaskError("add", "traceback", ConfigError("model.path: no such folder"))
    with pytest.raises(ConfigError, match=r"^model\.path: no such folder$"):
        adders(Handle(mistake)).call(0, Adder.add, 2).result()


def test_a_call_takes_the_card_and_a_call_beside_does_not() -> None:
    actors, turns = adders(Handle(5, PONG)), []
    actors.turn = lambda: turns.append("turn")
    assert actors.call(0, Adder.add, 2).result() == 5
    assert actors.call_beside(0, Adder.ping, timeout_s=1).result() == PONG
    assert turns == ["turn"]


def test_the_last_lines_of_a_dead_worker_are_found_where_ray_was_told_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with TemporaryDirectory(dir="/tmp") as short:  # as Ray's sockets need
        monkeypatch.setenv("RAY_TMPDIR", short)
        logs = Path(short) / "ray" / "session_1" / "logs"
        logs.mkdir(parents=True)
        (logs / "worker-ab-01000000-4294967.err").write_text("".join(f"line {i}\n" for i in range(9)))
        assert last_lines(4294967, count=2) == "\nIts last lines:\n  line 7\n  line 8"
        assert last_lines(4294966) == ""
