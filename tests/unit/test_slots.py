"""Who gets what comes next."""

from __future__ import annotations

import random

import pytest

from frpo.actors._slots import MOST_ENTRIES, Slots


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


def test_over_many_groups_it_is_the_emptiest_each_time_and_nothing_is_kept_of_before() -> None:
    slots, free, taken = Slots(num_workers=5, room=3), dict.fromkeys(range(5), 3), list[int]()
    rng = random.Random(0)
    for _ in range(2000):
        if taken and (len(slots) == 0 or rng.random() < 0.5):
            worker = taken.pop(rng.randrange(len(taken)))
            slots.give_back(worker)
            free[worker] += 1
        else:
            worker = slots.take()
            assert worker == min(free, key=lambda each: (-free[each], each))
            free[worker] -= 1
            taken.append(worker)
        assert len(slots) == sum(free.values())
        assert len(slots.heap) <= MOST_ENTRIES * 5
