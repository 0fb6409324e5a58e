"""Who draws what when engines finish, die and come back: the driver's end of drawing, on futures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from frpo.actors import _drawing
from frpo.actors._calls import Actors
from frpo.actors._drawing import Engines, EngineSession, StaleWeights
from frpo.roles import WorkerFailed
from frpo.types import Prompt, Ticket

PROMPT = Prompt("p", "?", np.array([9], np.int32), "t", {})


def ticket(number: int) -> Ticket:
    return Ticket(number, PROMPT, number)


class Pool:
    """Two engines with room for two tickets each; a test says what becomes of each call."""

    def __init__(self, limit_s: float = 5.0) -> None:
        self.calls: dict[int, tuple[int, Future[Any]]] = {}
        self.given_up, self.welcomed = 0, list[int]()
        handles: Any = [10, 11]
        self.actors: Actors[Any] = Actors("rollout", handles, timeout_s=limit_s)
        self.published, self.restores = 1, True
        self.session = EngineSession(
            Engines(self.actors, self.draw, self.give_up, self.restore, lambda: self.published, room=2)
        )

    def restore(self, worker: int, idle: bool) -> bool:
        self.welcomed.append(worker)
        return self.restores or idle

    def draw(self, worker: int, asked: Ticket, policy_version: int) -> Any:
        self.calls[asked.number] = (worker, Future())
        return SimpleNamespace(future=lambda: self.calls[asked.number][1])

    def give_up(self) -> None:
        self.given_up += 1

    def begin(self, *numbers: int) -> list[int]:
        """The worker that each was given to."""
        for number in numbers:
            self.session.begin(ticket(number), 3)
        return [self.calls[number][0] for number in numbers]

    def finish(self, number: int) -> None:
        self.calls[number][1].set_result(f"group {number}")

    def fail(self, number: int, error: Exception) -> None:
        self.calls[number][1].set_exception(error)


class Update:
    """A Running that a test makes ready."""

    def __init__(self) -> None:
        self.told: list[Callable[[], None]] = []

    def ready(self) -> bool:
        return False

    def result(self) -> object:
        raise WorkerFailed("learner worker 0 did not answer update() within 5 s.")

    def on_ready(self, call: Callable[[], None]) -> None:
        self.told.append(call)


def test_engines_get_prompts_in_turn_and_then_who_is_free_gets_the_next() -> None:
    pool = Pool()
    assert pool.session.room == 4
    assert pool.begin(0, 1, 2, 3) == [0, 1, 0, 1]
    assert pool.session.room == 0
    pool.finish(3)
    pool.finish(1)
    arrivals = pool.session.wait()
    assert (arrivals.groups, arrivals.lost) == (("group 3", "group 1"), ())
    assert pool.begin(4, 5) == [1, 1]


def test_a_group_says_when_it_was_there_not_when_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 12.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    pool = Pool()
    pool.begin(0, 1)
    pool.finish(1)
    pool.finish(0)
    monkeypatch.undo()
    arrived = pool.session.wait().arrived
    assert [(each.group, each.began, each.ended) for each in arrived] == [
        ("group 1", 11, 12),
        ("group 0", 10, 15),
    ]


def test_a_wait_ends_when_what_it_waits_for_beside_is_there() -> None:
    pool, update = Pool(), Update()
    pool.begin(0)
    update_call: Any = update
    for _ in range(2):
        pool.finish(len(pool.calls) - 1)
        assert len(pool.session.wait(update_call).groups) == 1
        pool.begin(len(pool.calls))
    (tell,) = update.told  # asked once, however often it is waited for
    tell()
    assert pool.session.wait(update_call).groups == ()


@pytest.mark.parametrize(
    "error",
    [
        ActorUnavailableError("gone", None),
        ObjectLostError("a0", "its owner", ""),
        RayTaskError("draw", "t", StaleWeights("runs -1")),
    ],
)
def test_an_engine_that_dies_loses_its_prompts_and_comes_back_with_the_weights(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(_drawing, "wait_until_back", lambda name, handle: waited.append(f"{name} {handle}"))
    pool = Pool()
    pool.begin(0, 1, 2, 3)
    pool.fail(1, error)
    pool.fail(3, error)
    arrivals = pool.session.wait()
    assert (arrivals.groups, set(arrivals.lost)) == ((), {1, 3})
    assert pool.session.room == 0  # the other engine is full
    while not pool.welcomed:
        pool.session.wait()
    assert pool.welcomed == [1]
    assert waited == ["rollout worker 1 11"]  # once
    assert pool.begin(1, 3) == [1, 1]
    pool.finish(0)
    assert pool.session.wait().groups == ("group 0",)


def test_an_engine_that_a_publish_brought_back_has_no_more_room_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is given a prompt in its new life before anybody looks at what it lost in the old one."""
    monkeypatch.setattr(_drawing, "wait_until_back", lambda name, handle: None)
    pool = Pool()
    assert pool.begin(0, 1, 2) == [0, 1, 0]
    pool.fail(1, ActorUnavailableError("gone", None))
    assert pool.begin(3) == [1]
    assert pool.session.wait().lost == (1,)
    while not pool.welcomed:
        pool.session.wait()
    assert pool.session.room == 2
    pool.finish(3)
    assert pool.session.wait().groups == ("group 3",)
    assert pool.session.room == 2
    pool.finish(0)
    pool.session.wait()
    assert pool.session.room == 3


def test_an_engine_that_cannot_have_the_weights_alone_draws_again_after_the_next_publish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a broadcast of the learner's own weights, which an update is changing just now."""
    monkeypatch.setattr(_drawing, "wait_until_back", lambda name, handle: None)
    pool = Pool()
    pool.restores = False
    update: Any = Update()
    pool.begin(0, 1)
    pool.fail(1, ActorUnavailableError("gone", None))
    pool.session.wait(update)
    while not pool.welcomed:
        pool.session.wait(update)
    assert pool.session.room == 1
    assert pool.begin(2) == [0]
    assert pool.session.room == 0
    pool.published = 2
    assert pool.session.room == 2
    assert pool.begin(1, 3) == [1, 1]


def test_an_engine_that_a_publish_has_waited_for_draws_as_soon_as_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has the weights from there, and is given none again."""
    came_back = threading.Event()
    monkeypatch.setattr(_drawing, "wait_until_back", lambda name, handle: came_back.wait(5))
    pool = Pool()
    pool.restores = False
    update: Any = Update()
    pool.begin(0, 1)
    pool.fail(1, ActorUnavailableError("gone", None))
    pool.session.wait(update)
    pool.published = 2
    came_back.set()
    while pool.session.away:
        pool.session.wait(update)
    assert pool.welcomed == []
    assert pool.begin(1, 2, 3) == [1, 0, 1]


def test_an_engine_that_is_back_while_the_learner_is_idle_draws_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next publish might wait for its groups."""
    monkeypatch.setattr(_drawing, "wait_until_back", lambda name, handle: None)
    pool = Pool()
    pool.restores = False
    pool.begin(0, 1, 2, 3)
    pool.fail(1, ActorUnavailableError("gone", None))
    pool.fail(3, ActorUnavailableError("gone", None))
    while not pool.welcomed:
        pool.session.wait()
    assert pool.begin(1, 3) == [1, 1]


def test_what_dies_for_good_is_named_with_the_call() -> None:
    pool = Pool()
    pool.begin(0)
    pool.fail(0, ActorDiedError())
    with pytest.raises(WorkerFailed, match=r"rollout worker 0 died during draw\(\)"):
        pool.session.wait()


def test_one_that_does_not_come_back_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str, handle: Any) -> None:
        raise WorkerFailed(f"{name} was killed and did not come back within 300 s.")

    monkeypatch.setattr(_drawing, "wait_until_back", never)
    pool = Pool()
    pool.begin(0)
    pool.fail(0, ActorUnavailableError("gone", None))
    assert pool.session.wait().lost == (0,)
    with pytest.raises(WorkerFailed, match="rollout worker 0 was killed and did not come back"):
        pool.session.wait()


def test_one_that_is_started_anew_is_waited_for_beyond_the_limit_of_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_drawing, "wait_until_back", lambda name, handle: time.sleep(0.3))
    pool = Pool(limit_s=0.05)
    pool.begin(0)
    pool.fail(0, ActorUnavailableError("gone", None))
    assert pool.session.wait().lost == (0,)
    pool.session.wait()
    assert pool.welcomed == [0]


def test_a_prompt_that_cannot_be_drawn_is_named() -> None:
    pool = Pool()
    pool.begin(0)
    pool.fail(0, RayTaskError("draw", "t", ValueError("prompt set:12: 40 tokens and 7 new ones")))
    with pytest.raises(WorkerFailed, match=r"rollout worker 0 failed in draw\(\).*prompt set:12: 40 tokens"):
        pool.session.wait()


def test_engines_that_finish_nothing_are_named_after_the_limit() -> None:
    pool = Pool(limit_s=0.05)
    pool.begin(0, 1)
    with pytest.raises(WorkerFailed, match=r"worker 0, rollout worker 1 finished no group within 0\.05 s"):
        pool.session.wait()


def test_a_learner_that_does_not_answer_is_named_where_nothing_is_drawn() -> None:
    pool, update = Pool(limit_s=0.05), Update()
    waited: Any = update
    with pytest.raises(WorkerFailed, match="learner worker 0 did not answer"):
        pool.session.wait(waited)


def test_only_what_is_under_way_is_given_up() -> None:
    pool = Pool()
    pool.session.close()
    assert pool.given_up == 0
    pool.begin(0)
    pool.session.close()
    assert pool.given_up == 1
