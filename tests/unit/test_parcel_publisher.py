"""A parcel lies with the rank that packed it: when that dies, engines that want it tell of the death."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OwnerDiedError, RayTaskError

from frpo.actors._calls import LostWithOwner, failure_of
from frpo.actors._publish import ParcelPublisher
from frpo.roles import RankDied
from tests.support.fakes import Now

LOST = LostWithOwner("rollout worker 0 found in deliver() that what it was given is lost: its owner died.")


class FakeEngines:
    """Take parcels in until they are lost."""

    def __init__(self) -> None:
        self.actors = SimpleNamespace(when_back=None)
        self.lost = False
        self.taken: list[Any] = []

    def forget(self) -> None: ...

    def deliver(self, parcel: Any, version: int) -> None:
        self._take(version)
        self.actors.when_back = lambda worker: self._take(f"{version} by {worker}")

    def _take(self, what: Any) -> None:
        if self.lost:
            raise LOST
        self.taken.append(what)


def publisher_of(engines: Any) -> ParcelPublisher:
    ranks = SimpleNamespace(died=partial(RankDied, "fine-tune"))
    source: Any = SimpleNamespace(pack=lambda: Now(SimpleNamespace(num_bytes=7)), actors=ranks)
    return ParcelPublisher(source, engines)


def test_an_engine_that_is_restarted_gets_the_parcel_again() -> None:
    engines = FakeEngines()
    assert publisher_of(engines).publish(3) == 7
    engines.actors.when_back(1)
    assert engines.taken == [3, "3 by 1"]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_parcel_that_died_with_its_rank_begins_the_job_anew(restarted: bool) -> None:
    engines = FakeEngines()
    publisher = publisher_of(engines)
    publisher.publish(3)
    engines.lost = True
    with pytest.raises(RankDied, match="its owner died") as error:
        engines.actors.when_back(0) if restarted else publisher.publish(4)
    assert error.value.job == "fine-tune"


def test_an_object_that_is_lost_is_told_apart_from_a_failure() -> None:
    lost = RayTaskError("deliver", "traceback", OwnerDiedError("a" * 40, "owner", "deliver"))
    assert isinstance(failure_of("rollout worker 0", "deliver", lost), LostWithOwner)
    assert not isinstance(failure_of("a", "b", RayTaskError("b", "t", ValueError("odd"))), LostWithOwner)
