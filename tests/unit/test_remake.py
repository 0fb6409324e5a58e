"""Published intervals made again from a bootstrap's bounds: those that the seeds themselves would have."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from scipy import stats

from benchmarks import remake
from frpo.report.intervals import Interval

LEADS = [0.02, 0.11, 0.05, -0.03, 0.09, 0.07]
MEAN = sum(LEADS) / 6
DRAWN_AGAIN = math.sqrt(sum((lead - MEAN) ** 2 for lead in LEADS) / 6 / 6)
"""Standard deviation of the mean of six that are drawn from these with replacement."""
BOUNDS = Interval(mean=MEAN, lo=MEAN - 1.96 * DRAWN_AGAIN, hi=MEAN + 1.96 * DRAWN_AGAIN)


@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 12])
def test_the_bounds_of_a_bootstrap_give_the_seeds_own_interval(confidence: float) -> None:
    made = remake.remake_interval(BOUNDS, 6, confidence)
    expected = stats.t.interval(confidence, 5, loc=MEAN, scale=stats.sem(LEADS))
    assert (made.lo, made.hi) == pytest.approx(expected)
    assert remake.remake_interval(BOUNDS, 4, confidence) == Interval(mean=MEAN, lo=None, hi=None)


def kept_study(seeds: int) -> dict[str, object]:
    bounds = BOUNDS.model_dump()
    row = {"a": "x", "b": "y", "matched_by": "steps", "at_kl": None, "num_seeds": seeds, "difference": MEAN}
    row |= {"lo": BOUNDS.lo, "hi": BOUNDS.hi, "corrected_lo": 0.0, "corrected_hi": 0.0}
    row |= {"kl_difference": bounds}
    comparisons = [{"metric": metric, **row} for metric in ("kept after f", "kept after g", "other tasks")]
    arms = [
        {"arm": "x", "kl": bounds, "kept": {"f": bounds, "g": {**bounds, "mean": 0.0}}, "certified": None}
    ]
    study = {"study": "s", "seeds": list(range(seeds)), "focus": "jokes", "headline": ["old"]}
    return {**study, "arms": arms, "comparisons": comparisons}


def test_a_study_is_remade_once_with_every_interval_and_its_headline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(kept_study(6)))
    monkeypatch.setattr(sys, "argv", ["remake.py", str(tmp_path)])
    remake.main()
    study = json.loads(file.read_text())
    own = stats.t.ppf(0.975, 5) * stats.sem(LEADS)
    for level in (
        study["arms"][0]["kl"],
        study["arms"][0]["kept"]["f"],
        study["comparisons"][2]["kl_difference"],
    ):
        assert (level["lo"], level["hi"]) == pytest.approx((MEAN - own, MEAN + own))
    assert study["arms"][0]["certified"] is None
    corrected = [row["corrected_hi"] - MEAN for row in study["comparisons"]]
    tails = [0.0125, 0.0125, 0.025]  # two kinds: kept reward, twice, and the other tasks
    assert corrected == pytest.approx([stats.t.ppf(1 - tail, 5) * stats.sem(LEADS) for tail in tails])
    limits = f"[{MEAN - own:+.3f}, {MEAN + own:+.3f}]"
    pair = f"x against y, more in 0 and less in 0 of 2, after g: +0.052 {limits} at KL +0.05 nats away."
    assert study["headline"][1] == pair
    assert remake.REMADE in study["headline"][-1]
    remake.main()
    assert json.loads(file.read_text()) == study


def test_a_study_of_three_seeds_keeps_its_means(tmp_path: Path) -> None:
    study = kept_study(3)
    remake.remake_study(study)
    assert study["arms"][0]["kl"] == {"mean": MEAN, "lo": None, "hi": None}  # type: ignore[index]
    assert [row["corrected_lo"] for row in study["comparisons"]] == [None] * 3  # type: ignore[attr-defined]
