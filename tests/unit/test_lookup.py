"""What a report looks up: the radius nearest to one, and means of what may be nothing."""

from __future__ import annotations

import math
import warnings

from frpo.report.lookup import mean_or_nan, nearest, task_measured, task_reward
from tests.support.builders import evaluation_of, measured_task


def test_the_value_at_the_nearest_radius_and_of_two_equally_near_the_first() -> None:
    radii = (0.25, 0.75, 2.0)
    values = (0.9, 0.6, 0.1)
    assert nearest(radii, values, 0.8) == 0.6
    assert nearest(radii, values, 9.0) == 0.1
    assert nearest(radii, values, 0.5) == 0.9


def test_a_mean_of_nothing_is_no_number() -> None:
    assert mean_or_nan([1.0, 2.0, 6.0]) == 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(mean_or_nan([]))


def test_a_task_that_was_not_measured_has_no_reward() -> None:
    easy = measured_task("easy", 0.75)
    evaluation = evaluation_of("a", measured_task("hard", 0.25), easy)
    assert task_measured(evaluation, "easy") is easy
    assert task_reward(evaluation, "easy") == easy.reward
    assert task_measured(evaluation, "other") is None
    assert task_reward(evaluation, "other") is None
