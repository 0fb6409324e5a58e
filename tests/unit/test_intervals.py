"""Intervals over seeds and prompts: by scipy's own t where there are no prompts, else by sums of squares
written out."""

from __future__ import annotations

import itertools
import math
from statistics import mean, stdev

import numpy as np
import pytest
from scipy import stats

from frpo.report.formats import format_difference, format_level
from frpo.report.intervals import MIN_SEEDS, Doubles, Interval, interval_of, interval_or_none


def limits_of(values: Doubles, confidence: float = 0.95) -> tuple[float, float]:
    interval = interval_of(values, confidence)
    assert interval.lo is not None
    assert interval.hi is not None
    return interval.lo, interval.hi


@pytest.mark.parametrize("confidence", [0.8, 0.95, 1 - 0.05 / 40])
def test_one_number_a_seed_has_students_interval(confidence: float) -> None:
    values = np.array([0.31, 0.12, 0.48, 0.27, 0.05, 0.66])
    expected = stats.t.interval(confidence, 5, loc=values.mean(), scale=stats.sem(values))
    assert limits_of(values[:, None], confidence) == pytest.approx(expected)
    assert interval_of(values[:, None], confidence).mean == pytest.approx(0.315)


def test_five_seeds_by_hand() -> None:
    """Seeds 1 to 5: the standard error of their mean 3 is sqrt(2.5 / 5), and t is 2.776 at four degrees of
    freedom in any table."""
    assert limits_of(np.arange(1.0, 6.0)[:, None]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-3)


def test_prompts_that_differ_in_noise_alone_leave_the_interval_of_the_seeds_means() -> None:
    seeds = np.array([0.1, 0.4, 0.2, 0.9, 0.3])
    values = seeds[:, None] + 0.2 * np.outer([1, -1, 1, -1, 0], [1, -1, -1, 1])
    assert values.mean(axis=0) == pytest.approx(np.full(4, seeds.mean()))
    scale = stdev(seeds) / math.sqrt(5)
    half = stats.t.ppf(0.975, 3) * scale  # of four prompts, three degrees of freedom
    assert limits_of(values) == pytest.approx((mean(seeds) - half, mean(seeds) + half))


def test_prompts_that_differ_for_all_seeds_widen_it_by_what_they_differ_in() -> None:
    """Noise is 0 here, so that both variances are those of the numbers that were put in."""
    seeds = np.array([0.1, 0.4, 0.2, 0.9, 0.3])
    prompts = np.array([0.0, 0.5, 0.1, 0.4, 0.2, 0.6, 0.3])
    half = stats.t.ppf(0.975, 4) * math.sqrt(stdev(seeds) ** 2 / 5 + stdev(prompts) ** 2 / 7)
    centre = mean(seeds) + mean(prompts)
    assert limits_of(seeds[:, None] + prompts) == pytest.approx((centre - half, centre + half))


def test_two_prompts_leave_one_degree_of_freedom() -> None:
    """Between prompts 0 and 2 lies a variance of 2, of their mean 1; t is 12.706 at one degree of freedom."""
    assert limits_of(np.array([[0.0, 2.0]] * 5)) == pytest.approx((1 - 12.706, 1 + 12.706), abs=1e-3)


def test_the_prompts_share_is_that_of_the_two_way_analysis_of_variance() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.3, 9) + rng.normal(0, 0.1, (6, 1)) + rng.normal(0, 0.2, (6, 9))
    grand = values.mean()
    of_seeds = [row.mean() for row in values]
    of_prompts = [column.mean() for column in values.T]
    noise = 0.0
    for i, k in itertools.product(range(6), range(9)):
        noise += (values[i, k] - of_seeds[i] - of_prompts[k] + grand) ** 2 / (5 * 8)
    between_seeds = 9 * sum((one - grand) ** 2 for one in of_seeds) / 5
    between_prompts = 6 * sum((one - grand) ** 2 for one in of_prompts) / 8
    variance = (between_seeds + between_prompts - noise) / 54  # Searle et al., Variance Components, 4.6
    half = stats.t.ppf(1 - 0.05 / 80, 5) * math.sqrt(variance)
    assert between_prompts > noise
    assert limits_of(values, 1 - 0.05 / 40) == pytest.approx((grand - half, grand + half))


def test_from_fewer_than_five_seeds_there_is_a_mean_and_no_interval() -> None:
    assert MIN_SEEDS == 5
    values = np.array([[0.25, 0.5], [0.0, 0.25], [0.5, 0.5], [0.75, 0.25]])
    assert interval_of(values) == Interval(mean=0.375, lo=None, hi=None)
    assert interval_of(np.arange(5.0)[:, None]).lo is not None


def test_without_a_number_of_some_seed_there_is_nothing() -> None:
    assert interval_or_none(np.array([[1.0], [math.nan], [2.0]])) is None
    assert interval_or_none(np.array([[1.0], [3.0]])) == Interval(mean=2.0, lo=None, hi=None)


def test_an_interval_in_words_leaves_out_limits_that_are_not_there() -> None:
    assert f"{Interval(mean=0.1, lo=-0.05, hi=0.25):+.2f}" == "+0.10 [-0.05, +0.25]"
    assert f"{Interval(mean=0.1, lo=None, hi=None):+.2f}" == "+0.10"
    assert f"{Interval(mean=0.1, lo=None, hi=0.25):+.2f}" == "+0.10"
    assert format_level(Interval(mean=0.5, lo=0.4, hi=0.6)) == "0.50 [0.40, 0.60]"
    assert format_difference(Interval(mean=0.5, lo=None, hi=None)) == "+0.500"
    assert format_level(None) == "–"
