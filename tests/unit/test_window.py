"""What is drawn ahead and what a step trains on: the example of the docstring, and what holds whatever the
engines do."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.types import Completion, Flight, Group, Prompt
from frpo.window import Window


def begin_all(window: Window) -> list[int]:
    begun = []
    while (number := window.begin_next()) is not None:
        begun.append(number)
    return begun


def arrive(window: Window, *numbers: int) -> None:
    """Drawn by the version under which they began."""
    for number in numbers:
        window.arrive(number, window.drawing[number])


def group(number: int, version: int) -> Group:
    one = np.array([version], np.int32)
    prompt = Prompt("p", "?", one, "t", {})
    return Group(number, prompt, (Completion(one, np.zeros(1, np.float32), one, "", "stop"),))


def test_the_example_of_the_docstring() -> None:
    window = Window(size=2, staleness=1, num_steps=9)
    assert begin_all(window) == [0, 1, 2, 3]
    arrive(window, 3)
    assert not window.ready
    arrive(window, 0, 2)
    assert window.ready
    assert window.take() == [0, 2]
    window.publish(1)
    assert begin_all(window) == [4, 5]
    arrive(window, 5)
    assert not window.ready  # 1 could not be trained later
    arrive(window, 1)
    assert window.ready
    assert window.take() == [1, 3]
    window.publish(2)
    assert begin_all(window) == [6, 7]
    arrive(window, 6)
    assert not window.ready
    arrive(window, 4)
    assert window.take() == [4, 5]


def test_a_step_leaves_no_more_of_an_age_than_the_steps_after_it_can_take() -> None:
    """Size 2, staleness 2: six began under version 0, and three steps may take them, two each."""
    window = Window(size=2, staleness=2, num_steps=9)
    assert len(begin_all(window)) == 6
    arrive(window, 0, 1)
    assert window.take() == [0, 1]
    window.publish(1)
    assert begin_all(window) == [6, 7]
    arrive(window, 6, 7)
    assert not window.ready  # 2, 3, 4 and 5 would be left for one step
    arrive(window, 5)
    assert not window.ready
    arrive(window, 3)
    assert window.take() == [3, 5]


def test_without_staleness_a_step_takes_its_own_prompts() -> None:
    window = Window(size=3, staleness=0, num_steps=2)
    for step in range(2):
        assert begin_all(window) == [3 * step, 3 * step + 1, 3 * step + 2]
        arrive(window, 3 * step + 2, 3 * step)
        assert not window.ready
        arrive(window, 3 * step + 1)
        assert window.take() == [3 * step, 3 * step + 1, 3 * step + 2]
        window.publish(step + 1)
    assert begin_all(window) == []


def test_what_is_lost_comes_first_and_is_as_old_as_its_second_beginning() -> None:
    window = Window(size=2, staleness=1, num_steps=9)
    begin_all(window)
    arrive(window, 0, 2)
    window.take()
    window.publish(1)
    window.lose(3)
    window.lose(1)
    assert begin_all(window) == [1, 3, 4, 5]
    assert window.drawing == {1: 1, 3: 1, 4: 1, 5: 1}
    arrive(window, 5, 4)
    assert window.ready
    assert window.take() == [4, 5]


def test_a_window_goes_on_where_another_stood() -> None:
    window = Window(size=2, staleness=1, num_steps=9)
    begin_all(window)
    arrive(window, 0, 2, 3)
    window.take()
    window.publish(1)
    begin_all(window)
    flight = window.flight([group(3, 0)])
    assert flight == Flight(begun=6, waiting=(1, 4, 5), groups=flight.groups)
    again = Window(size=2, staleness=1, num_steps=9, step=1, flight=flight)
    assert again.drawn == {3: 0}
    assert begin_all(again) == [1, 4, 5]
    arrive(again, 1, 5)
    assert again.take() == [3, 1]  # the oldest first


@pytest.mark.parametrize("in_flight", [True, False])
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 5),
    staleness=st.integers(0, 5),
    num_steps=st.integers(1, 12),
)
def test_whatever_the_engines_do_each_prompt_trains_once_and_none_is_too_old(
    in_flight: bool, seed: int, size: int, staleness: int, num_steps: int
) -> None:
    """Engines finish, lose and delay as they like, a run may be resumed after any step, and the step is taken
    as soon as it may be or later."""
    chance = random.Random(seed)
    window = Window(size, staleness, num_steps)
    trained: Counter[int] = Counter()
    versions: dict[int, int] = {}
    for step in range(num_steps):
        while True:
            begin_all(window)
            assert len(window.drawing) + len(window.drawn) <= (staleness + 1) * size
            if window.ready and (not window.drawing or chance.random() < 0.5):
                break
            assert window.drawing, "nothing could make the step ready"
            number = chance.choice(sorted(window.drawing))
            if chance.random() < 0.1:
                window.lose(number)
            else:
                first = chance.randint(window.drawing[number], window.version)
                versions[number] = first if in_flight else window.drawing[number]
                window.arrive(number, versions[number])
        taken = window.take()
        assert len(taken) == size
        assert all(0 <= step - versions[number] <= staleness for number in taken)
        trained.update(taken)
        window.publish(step + 1)
        if chance.random() < 0.2:
            groups = [group(number, version) for number, version in window.drawn.items()]
            flight = window.flight(groups)
            window = Window(size, staleness, num_steps, step=step + 1, flight=flight)
    assert trained == Counter(range(size * num_steps))
    assert not window.drawing
    assert not window.drawn
