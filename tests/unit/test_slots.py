"""Who gets what comes next."""

from __future__ import annotations

import pytest

from frpo.actors._slots import Slots


def test_the_emptiest_worker_is_next_and_the_first_among_equals() -> None:
    slots = Slots(num_workers=2, room=2)
    assert [slots.take() for _ in range(3)] == [0, 1, 0]
    slots.give_back(0)
    slots.give_back(0)
    assert len(slots) == 3
    assert [slots.take() for _ in range(3)] == [0, 0, 1]
    assert len(slots) == 0
    with pytest.raises(IndexError):
        slots.take()


def test_who_was_removed_gets_nothing_until_it_is_added_again_with_all_its_room() -> None:
    slots = Slots(num_workers=2, room=2)
    assert slots.take() == 0
    slots.remove(0)
    slots.give_back(0)  # what it had been given comes to nothing
    assert len(slots) == 2
    assert [slots.take() for _ in range(2)] == [1, 1]
    slots.add(0)
    assert [slots.take() for _ in range(2)] == [0, 0]
