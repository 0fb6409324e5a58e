"""What studies share: seeds that are kept in files, and families compared at equal KL."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.study_parts.contrasts import LEAST_SEEDS, Contrast, Row, Side, compare, level_of, middle_kl
from benchmarks.study_parts.seeds import KL, Seed, family_of, read_seeds

KEPT = "kept"
NOISE = (0.03, -0.01, 0.02, -0.04, 0.0, 0.05, -0.02, 0.01, -0.03, -0.01)


def make_seed(number: int, lead: float, top: float = 0.6) -> Seed:
    """Family a keeps KL + 0.3 + lead, b keeps KL + 0.3, each between 0.2 and `top` nats."""
    arms = {}
    for family, more in (("a", lead), ("b", 0.0)):
        for beta, kl in ((1, 0.2), (0.5, top)):
            arms[f"{family}-beta{beta}"] = {KL: [kl], KEPT: [kl + 0.3 + more]}
    return Seed(number, arms)


def compare_at(seeds: list[Seed], *kls: float) -> list[Row]:
    contrast = Contrast(KEPT, Side("a", KEPT), Side("b", KEPT, "plain b"))
    return list(compare(seeds, "does a keep more?", [contrast], kls))


def test_families_are_compared_on_their_curves_with_students_t_over_seeds() -> None:
    leads = [0.1 + noise for noise in NOISE]
    [row] = compare_at([make_seed(i, lead) for i, lead in enumerate(leads)], 0.41)
    error = stats.sem(leads)
    half = float(stats.t.ppf(0.975, 9) * error)
    assert (row.a, row.b, row.at_kl, row.num_seeds) == ("a", "plain b", 0.41, 10)
    assert row.difference == pytest.approx(0.1)
    assert (row.lo, row.hi) == pytest.approx((0.1 - half, 0.1 + half))
    assert (row.corrected_lo, row.corrected_hi) == pytest.approx((row.lo, row.hi))


def test_intervals_are_corrected_for_the_comparisons_that_enough_seeds_reach() -> None:
    seeds = [make_seed(i, noise, top=0.6 if i else 0.5) for i, noise in enumerate(NOISE)]
    near, middle, far = compare_at(seeds, 0.3, 0.4, 0.55)
    assert (near.num_seeds, middle.num_seeds, far.num_seeds) == (10, 10, 9)
    half = float(stats.t.ppf(1 - 0.025 / 2, 9) * stats.sem(NOISE))
    assert near.corrected_hi == pytest.approx(half)
    assert far.lo is far.corrected_lo is None
    assert far.difference == pytest.approx(sum(NOISE[1:]) / 9)


def test_a_level_needs_enough_seeds_that_reach_its_kl() -> None:
    seeds = [make_seed(i, noise) for i, noise in enumerate(NOISE)]
    level = level_of(seeds, Side("a", KEPT), 0.4)
    assert level is not None
    assert level.mean == pytest.approx(0.7)
    assert level_of(seeds, Side("a", KEPT), 0.7) is None
    assert level_of(seeds[: LEAST_SEEDS - 1], Side("a", KEPT), 0.4) is None


def test_a_comparison_takes_only_seeds_that_have_both_families() -> None:
    seeds = [make_seed(i, 0.1) for i in range(11)]
    seeds[3] = Seed(3, {arm: of for arm, of in seeds[3].arms.items() if family_of(arm) == "b"})
    [row] = compare_at(seeds, 0.4)
    assert row.num_seeds == 10
    assert row.difference == pytest.approx(0.1)


def test_a_family_is_a_name_without_its_weight() -> None:
    arms = ("grpo-gate-beta0.7", "frpo-k3-gate-beta2", "rare/frpo-kl0.3", "grpo")
    assert [family_of(arm) for arm in arms] == ["grpo-gate", "frpo-k3-gate", "rare/frpo", "grpo"]


def test_kept_seeds_are_read_in_order_and_need_no_run_folder(tmp_path: Path) -> None:
    for number in (41, 7):
        arms = {"grpo": {KL: [0.3], KEPT: [number / 100, math.nan]}}
        (tmp_path / f"seed-{number:03d}.json").write_text(json.dumps({"seed": number, "arms": arms}))
    seeds = read_seeds(tmp_path, None, lambda *_: pytest.fail("nothing is to be measured"))
    assert [seed.seed for seed in seeds] == [7, 41]
    assert seeds[1].arms["grpo"][KEPT][0] == 0.41
    assert math.isnan(seeds[1].arms["grpo"][KEPT][1])


def test_the_middle_of_what_two_families_reach_is_the_median_over_seeds() -> None:
    seeds = [make_seed(i, 0.0, top=top) for i, top in enumerate((0.4, 0.5, 0.9))]
    assert middle_kl(seeds, "a", "b") == pytest.approx((0.2 + 0.5) / 2)
    seeds[0].arms["a-beta1"][KL] = [0.3]  # then a reaches 0.3 to 0.4, and b 0.2 to 0.4
    assert middle_kl(seeds[:1], "a", "b") == pytest.approx(0.35)
