"""Comparisons over seeds on made-up reports: by hand where there is no noise, else by scipy's own t."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from frpo.report.comparisons import (
    Comparison,
    certified_within,
    compare_arms,
    end_of,
    kept_after,
    kl_of,
    read_curves,
)
from frpo.report.intervals import Doubles, Table, interval_of


def make_arm(name: str, family: str = "", **fields: Any) -> dict[str, Any]:
    """Settings of an arm, and what it measured: `kl`, `kept` by fine-tune and prompt, `other` and
    `certified`."""
    given = {
        "penalty": "k3",
        "beta": 0.1,
        "target_kl": None,
        "kl": 1.0,
        "kept": {},
        "other": 0.5,
        "certified": 0.3,
    }
    return {"name": name, "family": family or name, **given, **fields}


def make_estimate(value: float | None) -> Any:
    return None if value is None else SimpleNamespace(mean=value)


def make_reward(task: str, value: float) -> Any:
    return SimpleNamespace(task=task, mean=value, reward=make_estimate(value))


def make_report(*arms: dict[str, Any]) -> Any:
    """Of one seed, as the comparisons read it. The focus is "jokes", the other trained task "sums"."""
    rows = []
    planes = []
    runs = []
    for a in arms:
        kept = []
        for (name, values), task in itertools.product(a["kept"].items(), ("sums", "jokes")):
            after = make_estimate(mean(value for value in values if value is not None))
            per_prompt = values if task == "jokes" else [9.0]
            kept.append(SimpleNamespace(downstream=name, task=task, after=after, per_prompt=per_prompt))
        rewards = [make_reward("jokes", 9.0), make_reward("sums", a["other"])]
        evaluation = SimpleNamespace(kl_reference=make_estimate(a["kl"]), rewards=rewards)
        settings = {key: a[key] for key in ("name", "family", "penalty", "beta", "target_kl")}
        rows.append(SimpleNamespace(**settings, kept=kept, evaluation=evaluation))
        for name in a["kept"]:
            ends = ("first", "later", f"{a['name']} after {name}")
            runs.append(SimpleNamespace(arm=a["name"], task=name, evaluations=ends))
        if a["certified"] is not None:
            bounds = (9.0, a["certified"], 9.0)
            for task in ("jokes", "sums"):
                plane = SimpleNamespace(arm=a["name"], task=task, radii=(0.1, 0.4, 0.7), certified=bounds)
                planes.append(plane)
    return SimpleNamespace(arms=rows, tasks=["jokes", "sums"], robustness=planes, downstream=runs)


def made_up(seed: int, prompts: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def kept(lead: float) -> dict[str, list[float]]:
        return {name: list(lead + rng.normal(0, 0.1, prompts)) for name in ("f", "g")}

    return [
        make_arm("first", kl=1.0, kept=kept(0.4), other=0.5, certified=0.3),
        make_arm("second", kl=1.0 + rng.random(), kept=kept(0.6), other=0.5 + rng.random(), certified=0.2),
        make_arm("third", kl=2.0, kept=kept(0.1), other=rng.normal(0.5, 0.2), certified=0.1 * rng.random()),
    ]


def table_of(seeds: int = 5) -> Table:
    return Table([make_report(*made_up(seed)) for seed in range(seeds)], "jokes")


# ---- what is read


def test_fine_tunes_are_those_that_every_arm_of_every_seed_was_measured_after() -> None:
    some = [
        make_arm("a", kept={"g": [1.0], "f": [1.0]}),
        make_arm("b", kept={"f": [1.0], "g": [1.0], "h": [1.0]}),
    ]
    fewer = [make_arm("a", kept={"f": [1.0], "h": [1.0]}), make_arm("b", kept={"f": [1.0]})]
    assert Table([make_report(*some)], "jokes").finetunes == ["f", "g"]
    assert Table([make_report(*some), make_report(*fewer)], "jokes").finetunes == ["f"]
    assert Table([make_report(*some)], "jokes").arms == ["a", "b"]
    of = make_report(*some)
    of.arms[0].kept = [kept for kept in of.arms[0].kept if (kept.downstream, kept.task) != ("f", "jokes")]
    assert Table([of], "jokes").finetunes == ["g"]
    assert Table([of], "sums").finetunes == ["f", "g"]


# ---- what is compared


def test_values_are_read_from_the_arm_and_task_that_they_are_of() -> None:
    of = make_report(
        make_arm("a", kl=0.5, kept={"f": [0.1, None, 0.5]}, certified=0.2),
        make_arm("b", kl=None, kept={"f": [0.9, 0.9, 0.9]}, certified=None),
    )
    assert kept_after("f", "jokes")(of, 0) == [
        0.1,
        pytest.approx(0.3),
        0.5,
    ]  # a failed prompt counts as the mean
    assert kl_of(of, 0) == 0.5
    assert math.isnan(kl_of(of, 1))
    assert certified_within("jokes")(of, 0) == 0.2  # 0.4 is nearest to 0.5
    assert certified_within("jokes", radius=0.69)(of, 0) == 9.0
    assert math.isnan(certified_within("jokes")(of, 1))
    assert end_of(of, 1, "f") == "b after f"


def numbers_of(number: int, metric: str) -> Doubles:
    """[seeds, prompts] that made_up gave one of its arms, in the five seeds of table_of."""
    arms = [made_up(seed)[number] for seed in range(5)]
    finetune = metric.removeprefix("kept after ")
    if finetune != metric:
        return np.array([arm["kept"][finetune] for arm in arms])
    field = "other" if metric == "other tasks" else metric
    return np.array([[arm[field]] for arm in arms])


def test_every_arm_is_compared_with_the_first_as_it_is_with_the_interval_of_its_own_seeds() -> None:
    table = table_of()
    compared = [c for c in compare_arms(table) if c.matched_by == "steps"]
    assert Counter((c.a, c.b) for c in compared) == {("second", "first"): 4, ("third", "first"): 4}
    sizes = {"kept after f": 4, "kept after g": 4, "other tasks": 2, "certified": 2}  # corrected together
    for c in compared:
        i = {"second": 1, "third": 2}[c.a]
        gap = numbers_of(i, c.metric) - numbers_of(0, c.metric)
        assert c.difference == pytest.approx(gap.mean())
        assert c.interval == interval_of(gap)
        corrected = interval_of(gap, 1 - 0.05 / sizes[c.metric])
        assert (c.corrected_lo, c.corrected_hi) == (corrected.lo, corrected.hi)
        assert corrected.lo is not None
        assert corrected.hi is not None
        assert c.verdict == int(corrected.lo > 0) - int(corrected.hi < 0)
        assert c.kl_difference is not None
        apart = (numbers_of(i, "kl") - numbers_of(0, "kl"))[:, 0]
        assert c.kl_difference.mean == pytest.approx(apart.mean())
        assert c.kl_difference.hi == pytest.approx(apart.mean() + stats.t.ppf(0.975, 4) * stats.sem(apart))
        assert (c.at_kl, c.at_beta, c.num_seeds) == (None, None, 5)
    assert {c.verdict for c in compared} == {-1, 0, 1}


def test_a_metric_that_some_seed_lacks_is_not_compared() -> None:
    whole = [make_arm("a", kept={"f": [0.5]}), make_arm("b", kept={"f": [0.6]})]
    lacking = [make_arm("a", kept={"f": [0.5]}), make_arm("b", kept={"f": [0.6]}, certified=None)]
    compared = compare_arms(Table([make_report(*whole), make_report(*lacking)], "jokes"))
    assert {c.metric for c in compared} == {"kept after f", "other tasks"}


def test_a_kl_that_some_seed_lacks_is_said_of_none() -> None:
    whole = [make_arm("a", kept={"f": [0.5]}), make_arm("b", kept={"f": [0.6]}, kl=None)]
    assert {c.kl_difference for c in compare_arms(Table([make_report(*whole)], "jokes"))} == {None}


def test_equal_weight_compares_families_with_the_first_of_their_penalty_under_one_beta() -> None:
    arms = [
        make_arm("steered", "old", beta=0.1, target_kl=0.5, other=9.0),
        make_arm("old-1", "old", beta=0.1, other=0.1, kl=0.2),
        make_arm("old-2", "old", beta=0.2, other=0.2, kl=0.3),
        make_arm("new-1", "new", beta=0.1, other=0.5, kl=0.9),
        make_arm("new-2", "new", beta=0.2, other=0.8, kl=0.8),
        make_arm("new-3", "new", beta=0.3, other=0.9),
        make_arm("turned", "reverse old", penalty="reverse", beta=0.1, other=0.3, kl=0.4),
        make_arm("turned-new", "reverse new", penalty="reverse", beta=0.1, other=0.35, kl=0.1),
    ]
    compared = [
        c
        for c in compare_arms(Table([make_report(*arms)], "jokes"))
        if (c.matched_by, c.metric) == ("beta", "other tasks")
    ]
    rows = [
        (c.a, c.b, c.at_beta, round(c.difference, 9), round(c.kl_difference.mean, 9))
        for c in compared
        if c.kl_difference
    ]
    assert rows == [
        ("new", "old", 0.1, 0.4, 0.7),
        ("new", "old", 0.2, 0.6, 0.5),
        ("reverse new", "reverse old", 0.1, 0.05, -0.3),
    ]
    assert {c.at_kl for c in compared} == {None}


def make_curves(other: tuple[float, float], seeds: int = 5) -> Table:
    """Two families: 0.2 + 0.4 KL at KLs 0 and 1, and 0.5 + 0.1 KL at those of `other`; the same for every
    seed."""
    arms = [
        *(make_arm(f"old-{kl}", "old", kl=kl, other=0.2 + 0.4 * kl, beta=0.1 + kl) for kl in (1.0, 0.0)),
        *(make_arm(f"new-{kl}", "new", kl=kl, other=0.5 + 0.1 * kl, beta=0.2 + kl) for kl in other),
    ]
    return Table([make_report(*arms)] * seeds, "jokes")


def test_at_equal_kl_families_are_read_off_their_curves_inside_the_overlap() -> None:
    compared = at_equal_kl(make_curves((0.2, 2.0)))
    assert [(c.a, c.b) for c in compared] == [("new", "old")] * 3
    assert [c.at_kl for c in compared] == pytest.approx([0.4, 0.6, 0.8])
    for c in compared:
        assert c.at_kl is not None
        assert c.difference == pytest.approx(0.3 - 0.3 * c.at_kl)
        assert (c.lo, c.hi) == pytest.approx((c.difference, c.difference))
        assert (c.at_beta, c.kl_difference) == (None, None)


def move_curves(*ups: float) -> Table:
    """In each seed the old family is `up` + 0.4 KL on KLs 0 to 1, the new 0.5 + `up` on `up` to 1 + `up`."""
    reports = []
    for up in ups:
        old = [make_arm(f"old-{kl}", "old", kl=kl, other=up + 0.4 * kl, beta=0.1 + kl) for kl in (0.0, 1.0)]
        new = [make_arm(f"new-{kl}", "new", kl=kl + up, other=0.5 + up, beta=0.2 + kl) for kl in (0.0, 1.0)]
        reports.append(make_report(*old, *new))
    return Table(reports, "jokes")


def at_equal_kl(table: Table) -> list[Comparison]:
    return [c for c in compare_arms(table) if (c.matched_by, c.metric) == ("kl", "other tasks")]


def test_each_seed_has_a_curve_of_its_own() -> None:
    """A seed whose values are all 0.3 higher moves both curves; their difference has none of that noise."""
    compared = at_equal_kl(move_curves(0.0, 0.3, 0.0, 0.3, 0.0, 0.3))
    # mean curves: old on [0, 1], new on [0.15, 1.15]
    assert [c.at_kl for c in compared] == pytest.approx([0.3625, 0.575, 0.7875])
    for c in compared:
        assert c.at_kl is not None
        assert c.num_seeds == 6
        assert c.difference == pytest.approx(0.5 - 0.4 * c.at_kl)
        assert (c.lo, c.hi) == pytest.approx((c.difference, c.difference))


def test_a_seed_whose_arms_do_not_reach_a_kl_is_left_out_there() -> None:
    compared = at_equal_kl(move_curves(0.0, 0.0, 0.0, 0.0, 0.0, 0.6))
    # mean curves: old on [0, 1], new on [0.1, 1.1]; the last seed's new family begins at 0.6
    assert [c.at_kl for c in compared] == pytest.approx([0.325, 0.55, 0.775])
    assert [c.num_seeds for c in compared] == [5, 5, 6]
    assert [c.difference for c in compared] == pytest.approx([0.37, 0.28, 0.19])


def test_a_kl_that_fewer_than_five_seeds_reach_has_no_interval_and_one_that_none_reaches_no_row() -> None:
    compared = at_equal_kl(move_curves(0.0, 0.0, 0.0, 0.0, 0.0, 0.6, 0.6))
    assert [(c.num_seeds, c.lo is None) for c in compared] == [(5, False), (5, False), (7, False)]
    compared = at_equal_kl(move_curves(0.0, 0.0, 0.0, 0.6, 0.6, 0.6))
    # mean curves: new on [0.3, 1.3]; compared at 0.475, 0.65 and 0.825
    assert [(c.num_seeds, c.lo, c.corrected_hi, c.verdict) for c in compared[:1]] == [(3, None, None, 0)]
    assert [c.num_seeds for c in compared] == [3, 6, 6]
    assert [c.verdict for c in compared] == [0, 1, 1]
    apart = at_equal_kl(move_curves(-0.9, 0.9))  # new on [-0.9, 0.1] and [0.9, 1.9], old on [0, 1]
    assert apart == []


def test_curves_are_read_between_the_arms_of_a_seed_in_the_order_of_their_kls() -> None:
    kl = np.array([[0.6, 0.2], [0.2, 0.3], [0.4, 0.9]])
    values = np.array([[[9.0, 8.0], [1.0, 1.0]], [[5.0, 0.0], [2.0, 3.0]], [[7.0, 2.0], [4.0, 9.0]]])
    # seed 0: 0.2 -> (5, 0), 0.4 -> (7, 2), 0.6 -> (9, 8); seed 1: 0.2 -> (1, 1), 0.3 -> (2, 3), 0.9 -> (4, 9)
    np.testing.assert_allclose(read_curves(kl, values, 0.5), [[8.0, 5.0], [2 + 2 / 3, 5.0]])
    np.testing.assert_allclose(read_curves(kl, values, 0.2), [[5.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(read_curves(kl, values, 0.7), [[np.nan, np.nan], [2 + 4 / 3, 7.0]])
    assert np.isnan(read_curves(kl, values, 0.1)).all()


def test_the_overlap_is_that_of_the_mean_curves() -> None:
    noise = np.random.default_rng(2).normal(0, 0.1, (6, 2))
    reports = []
    for of_old, of_new in noise:
        old = [make_arm(f"old-{kl}", "old", kl=kl + of_old, beta=0.1 + kl) for kl in (0.0, 1.0)]
        new = [make_arm(f"new-{kl}", "new", kl=kl + of_new, beta=0.2 + kl) for kl in (0.4, 0.8)]
        reports.append(make_report(*old, *new))
    inside = np.array([0.5, 0.6, 0.7]) + noise[:, 1].mean()  # the new one's lies inside the old one's
    assert compared_kls(reports) == pytest.approx(inside)
    assert compared_kls([swap_families(each) for each in reports]) == pytest.approx(inside)


def compared_kls(reports: list[Any]) -> list[float]:
    return sorted({c.at_kl for c in compare_arms(Table(reports, "jokes")) if c.at_kl is not None})


def swap_families(of: Any) -> Any:
    """The other family first."""
    return SimpleNamespace(**{**vars(of), "arms": of.arms[2:] + of.arms[:2]})


@pytest.mark.parametrize("other", [(1.0, 2.0), (1.5, 2.0)])
def test_curves_that_do_not_overlap_are_not_compared_at_equal_kl(other: tuple[float, float]) -> None:
    assert {c.matched_by for c in compare_arms(make_curves(other))} == {"steps"}


def test_a_family_of_one_arm_or_an_unmeasured_kl_has_no_curve() -> None:
    old = [make_arm(f"old-{kl}", "old", kl=kl, other=kl, beta=0.1 + kl) for kl in (0.0, 1.0)]
    lone = Table([make_report(*old, make_arm("new", kl=0.5, beta=0.7))], "jokes")
    assert {c.matched_by for c in compare_arms(lone)} == {"steps"}
    new = [make_arm(f"new-{kl}", "new", kl=kl, other=kl, beta=0.3 + kl) for kl in (0.1, 0.9)]
    assert "kl" in {c.matched_by for c in compare_arms(Table([make_report(*old, *new)], "jokes"))}
    new[0]["kl"] = None
    assert "kl" not in {c.matched_by for c in compare_arms(Table([make_report(*old, *new)], "jokes"))}
