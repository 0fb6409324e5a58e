"""What a loop's clock says of groups, and of spans that lie over one another."""

from __future__ import annotations

import time

import numpy as np
import pytest

from frpo.clock import Clock, Span, merge_spans
from frpo.types import Arrival, Group, Prompt

GROUP = Group(0, Prompt("p", "?", np.array([9], np.int32), "t", {}), ())


@pytest.mark.parametrize(
    ("spans", "merged"),
    [
        ([], ()),
        ([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0)], ((0.0, 3.0), (4.0, 5.0))),
        ([(0.0, 9.0), (1.0, 2.0), (3.0, 10.0)], ((0.0, 10.0),)),
        ([(0.0, 1.0), (1.0, 2.0)], ((0.0, 2.0),)),
    ],
)
def test_spans_are_merged_where_they_meet(spans: list[Span], merged: tuple[Span, ...]) -> None:
    assert merge_spans(spans) == merged


def test_when_the_groups_of_a_step_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    now = 130.0
    clock.begin_step()
    for name in ("generate", "score", "update", "publish"):
        with clock.phase(name):
            now += 1
    earlier = Arrival(GROUP)
    ahead, just_there, late = Arrival(GROUP, 105, 110), Arrival(GROUP, 125, 130), Arrival(GROUP, 120, 130.5)
    times = clock.times([late, just_there, ahead, earlier])
    assert times.drawn == ((0, 0), (5, 10), (20, 30.5))
    assert times.groups_ahead == 3
    assert (times.generate_at, times.score_at, times.update_at, times.publish_at) == (30, 31, 32, 33)
