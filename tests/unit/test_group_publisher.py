"""Who takes part in a broadcast of weights: the group is formed again when one of them is another process."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from frpo.actors._publish import GroupPublisher
from frpo.actors._train import TrainWorker
from frpo.actors.rollout import EngineLost
from tests.support.fakes import Now


class FakeRanks:
    """Two ranks; keeps what they are asked."""

    def __init__(self) -> None:
        self.processes, self.asked, self.actors = [11, 12], list[str](), self
        self.engines: FakeEngines | None = None

    def call(self, index: int, method: Any, *given: Any) -> Now:
        self.asked.append(method.__name__)
        return Now(("here", 5) if method is TrainWorker.address else None)

    def submit_all(self, method: Any) -> list[Now]:
        self.asked.append(method.__name__ if self.engines and self.engines.settled else "too early")
        return [Now(None), Now(None)]

    def call_all(self, method: Any, *given: Any) -> list[Any]:
        self.asked.append(method.__name__)
        return [SimpleNamespace(num_bytes=7)] * 2


class FakeEngines:
    num_ranks, restarts = 1, 2

    def __init__(self) -> None:
        self.process, self.received, self.actors = 21, list[int](), SimpleNamespace(when_back=None)
        self.settled = False
        self.dies = 0
        """How often in the broadcasts that come."""

    def forget(self) -> None: ...

    def members(self) -> tuple[int, ...]:
        return (self.process,)

    def join_group(self, *given: Any) -> None: ...

    def settle(self) -> None:
        self.settled = True

    def receive(self, parcel: Any, version: int, sending: Sequence[Any]) -> None:
        assert len(sending) == 2
        if self.dies:
            self.dies -= 1
            self.process += 1
            raise EngineLost("rollout worker 0 died during deliver().")
        self.received.append(version)


FORMED = ["address", "open_weight_group", "announce", "pack"]


def test_the_group_is_formed_anew_when_an_engine_or_a_rank_was_restarted() -> None:
    ranks, engines = FakeRanks(), FakeEngines()
    ranks.engines = engines
    source: Any = ranks
    rollouts: Any = engines
    publisher = GroupPublisher("learner", source, rollouts, "gloo")
    asked = []
    for version, (rank, engine) in enumerate([(11, 21), (11, 21), (11, 22), (13, 22), (13, 22)]):
        ranks.processes[0], engines.process, engines.settled = rank, engine, False
        assert publisher.publish(version) == 7
        asked.append(list(ranks.asked))
        ranks.asked.clear()
    assert asked == [FORMED, ["pack"], FORMED, FORMED, ["pack"]]
    assert engines.received == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_a_broadcast_in_which_an_engine_dies_is_made_again_by_a_new_group(deaths: int) -> None:
    """As often as an engine may be restarted."""
    ranks, engines = FakeRanks(), FakeEngines()
    ranks.engines, engines.settled, engines.dies = engines, True, deaths
    source: Any = ranks
    rollouts: Any = engines
    publisher = GroupPublisher("learner", source, rollouts, "gloo")
    if deaths <= engines.restarts:
        assert publisher.publish(4) == 7
        assert engines.received == [4]
    else:
        with pytest.raises(EngineLost):
            publisher.publish(4)
    assert ranks.asked == FORMED * min(deaths + 1, 3)
