"""docs/choosing.md says what the studies' files hold, and names objectives that there are."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any, get_args

import pytest

from frpo.config import ObjectiveConfig
from tests.support.pages import ROOT, code_in, read_tables

TABLES = read_tables("choosing.md")
COMPARED = list(chain.from_iterable(table.rows for table in TABLES if table.header[0] == "study"))
HARSH = "kept after crafts-harsh"


def read_rows(study: str) -> list[tuple[str, ...]]:
    """The comparisons of a study as the page has them, one for each way to say where they were made."""
    kept = json.loads((ROOT / "docs" / "results" / f"{study}.json").read_text())
    rows = list[tuple[str, ...]]()
    for one in kept["comparisons"]:
        if one["difference"] is None:  # no seed reaches it
            continue
        compared = f"{one['a']} − {one['b']}"
        rows += [(study, compared, place, *differences_of(one)) for place in places_of(one)]
    return rows


def places_of(one: dict[str, Any]) -> list[str]:
    """Where a comparison was made: at a KL, in a setting of the map, at one β, or of one metric."""
    matched_by = one.get("matched_by", "kl")
    if matched_by == "kl" and one["at_kl"] is None:
        return [one["metric"]]
    if one["metric"] != HARSH:
        return [one["metric"]] if matched_by == "steps" else []
    if "label" in one:
        return [one["label"]]
    if matched_by == "beta":
        return [f"one β, {one['kl_difference']['mean']:+.2f} nats"]
    return [f"KL {one['at_kl']:.2f}"] if matched_by == "kl" else []


def differences_of(one: dict[str, Any]) -> tuple[str, str]:
    if one["lo"] is None:
        return f"{one['difference']:+.3f}", ""
    interval = f"[{one['lo']:+.3f}, {one['hi']:+.3f}]"
    return f"{one['difference']:+.3f} {interval}", f"[{one['corrected_lo']:+.3f}, {one['corrected_hi']:+.3f}]"


@pytest.mark.parametrize("study", sorted({row[0] for row in COMPARED}))
def test_every_difference_is_that_of_the_study(study: str) -> None:
    rows = [row for row in COMPARED if row[0] == study]
    assert rows
    assert set(rows) <= set(read_rows(study))


def test_the_page_compares_under_all_studies_over_seeds() -> None:
    assert len(COMPARED) == 40
    shapes = (
        "k3",
        "k3_more",
        "k3_beta",
        "reverse",
        "reverse_more",
        "penalties",
        "map",
        "gate",
        "defences",
        "attack",
    )
    assert {row[0] for row in COMPARED} == {f"testbed_{shape}" for shape in shapes}


def test_every_penalty_is_explained() -> None:
    (table,) = [table for table in TABLES if "`objective.penalty`" in table.header]
    penalties = get_args(ObjectiveConfig.model_fields["penalty"].annotation)
    assert {code_in(cell)[0] for cell in table.column("`objective.penalty`")} == set(penalties)
