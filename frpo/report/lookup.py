"""What is looked up in the records of a report: one task of an evaluation, one radius of a curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frpo.records import Estimate, Evaluation, TaskReward


def task_measured(evaluation: Evaluation, task: str) -> TaskReward | None:
    """What was measured of one task; None where it was not."""
    return next((measured for measured in evaluation.rewards if measured.task == task), None)


def task_reward(evaluation: Evaluation, task: str) -> Estimate | None:
    """Mean reward of one task; None where it was not measured."""
    measured = task_measured(evaluation, task)
    return measured.reward if measured else None


def nearest(radii: Sequence[float], values: Sequence[float], radius: float) -> float:
    """The value at the radius nearest to the given one; of two equally near the first.

    Example: radii (0.1, 0.4, 1.0), values (0.9, 0.7, 0.2) and radius 0.5 give 0.7.
    """
    distances = [abs(each - radius) for each in radii]
    return values[distances.index(min(distances))]


def mean_or_nan(values: Sequence[float]) -> float:
    """Mean of the values; nan for none."""
    return float(np.mean(values)) if values else float("nan")
