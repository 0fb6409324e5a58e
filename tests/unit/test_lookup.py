"""What a report looks up: the radius nearest to one, and means of what may be nothing."""

from __future__ import annotations

import math

from frpo.report.lookup import mean_or_nan, nearest


def test_the_value_at_the_nearest_radius_and_of_two_equally_near_the_first() -> None:
    radii = (0.25, 0.75, 2.0)
    values = (0.9, 0.6, 0.1)
    assert nearest(radii, values, 0.8) == 0.6
    assert nearest(radii, values, 9.0) == 0.1
    assert nearest(radii, values, 0.5) == 0.9


def test_a_mean_of_nothing_is_no_number() -> None:
    assert mean_or_nan([1.0, 2.0, 6.0]) == 3.0
    assert math.isnan(mean_or_nan([]))
