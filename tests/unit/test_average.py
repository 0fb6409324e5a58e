"""The average of weights, and the way uphill, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from frpo.actors._average import Gradient, WeightAverage, climbed


def weights_of(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value])) for value in values]


def test_the_average_weighs_each_update_by_its_age() -> None:
    trained = weights_of(0.0, 10.0)
    average = WeightAverage(trained, 0.5)
    for first, second in ((1.0, 4.0), (2.0, 8.0), (4.0, 0.0)):
        trained[0].data.fill_(first)
        trained[1].data.fill_(second)
        average.add()
    average.replace()
    shares = (0.25, 0.5, 1.0)
    assert trained[0].item() == pytest.approx((0.25 * 1 + 0.5 * 2 + 4) / sum(shares))
    assert trained[1].item() == pytest.approx((0.25 * 4 + 0.5 * 8) / sum(shares))


def test_of_one_update_the_average_is_its_weight_and_the_start_does_not_count() -> None:
    trained = weights_of(7.0)
    average = WeightAverage(trained, 0.99)
    trained[0].data.fill_(3.0)
    average.add()
    average.replace()
    assert trained[0].item() == 3.0


def test_an_average_of_bfloat16_keeps_what_lies_between_its_numbers() -> None:
    trained = [nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))]
    average = WeightAverage(trained, 0.9)
    for value in (1.0, 1.0078125):  # neighbours
        trained[0].data.fill_(value)
        average.add()
    assert float(average.values[0]) == pytest.approx((0.9 + 1.0078125) / 1.9)
    assert average.values[0].dtype == torch.float32


def test_an_average_goes_on_from_its_state() -> None:
    one, other = weights_of(1.0), weights_of(5.0)
    first = WeightAverage(one, 0.5)
    first.add()
    second = WeightAverage(other, 0.5)
    second.restore(**first.state())  # type: ignore[arg-type]
    other[0].data.fill_(4.0)
    second.add()
    assert float(second.values[0]) == pytest.approx((0.5 * 1 + 4) / 1.5)


def test_uphill_is_the_radius_away_along_the_gradient_and_back_again() -> None:
    x, y = trained = weights_of(3.0, 4.0)
    gradient = Gradient(trained)
    gradient.add((x**2 / 2).sum())
    gradient.add((y**2 / 2).sum())  # another pass, which does not see x
    assert gradient.norm() == pytest.approx(5.0)
    assert x.grad is None
    with climbed(gradient, 0.5):
        assert (x.item(), y.item()) == pytest.approx((3.3, 4.4))
        (x**2 / 2).sum().backward()
    assert (x.item(), y.item()) == (3.0, 4.0)
    assert x.grad.item() == pytest.approx(3.3)  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_without_a_slope_there_is_nowhere_to_climb(value: float) -> None:
    (x,) = trained = weights_of(2.0)
    gradient = Gradient(trained)
    gradient.add((value * x).sum())
    with climbed(gradient, 0.5):
        assert x.item() == 2.0
