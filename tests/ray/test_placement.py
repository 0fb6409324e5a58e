"""Which actor sees which card, on a Ray of eight cards that are none: who shares with whom, and who must see
none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from frpo.cluster import Spawner, place_bundles
from frpo.config import Config
from frpo.planning import plan_run
from frpo.recipe import load_recipe
from frpo.resources import count_gpus
from tests.support import models
from tests.support.cards import Sight

pytestmark = pytest.mark.skipif(count_gpus() > 0, reason="the cards of this machine are real")

FEW_CPUS = tuple(
    f"{role}.num_cpus=0.05" for role in ("rollout", "reward", "reference", "evaluate", "learner")
)
Cards = dict[str, list[tuple[int, ...]]]


@contextmanager
def placed(config: Config) -> Iterator[Spawner]:
    asked = plan_run(config)
    group = place_bundles(config, asked)
    try:
        yield Spawner(config, asked, group)
    finally:
        remove_placement_group(group)


def seen(config: Config) -> Cards:
    """Cards of every worker, by role; the least of them counted as 0."""
    with placed(config) as spawner:
        handles = {
            a.role: spawner.workers(a.role, Sight, [()] * a.count, {}, 0) for a in spawner.asked.actors
        }
        found: Cards = {
            role: ray.get([h.cards.remote() for h in workers], timeout=120)
            for role, workers in handles.items()
        }
        for handle in chain.from_iterable(handles.values()):
            ray.kill(handle)
    of_workers = chain.from_iterable(found.values())
    first = min(chain.from_iterable(of_workers), default=0)
    return {role: [tuple(c - first for c in card) for card in cards] for role, cards in found.items()}


def config(*sets: str) -> Config:
    return models.config(*FEW_CPUS, *sets)


def test_one_card_holds_all_that_ask_for_it(ray_cluster: None) -> None:
    sets = (
        "rollout.num_gpus=1",
        "learner.num_gpus=1",
        "reference.num_gpus=1",
        "evaluate.num_gpus=1",
        "rollout.sleep=true",
    )
    cards = seen(config(*sets))
    assert cards.pop("reward") == [()]
    assert cards == {role: [(0,)] for role in ("learner", "finetune", "rollout", "reference", "evaluate")}


def test_learner_rank_i_shares_with_engine_i(ray_cluster: None) -> None:
    sets = (
        "rollout.num_gpus=1",
        "learner.num_gpus=1",
        "rollout.sleep=true",
        "rollout.num_workers=4",
        "learner.num_workers=4",
    )
    cards = seen(config(*sets, "evaluate.num_gpus=1", "evaluate.num_workers=2"))
    assert cards["learner"] == cards["finetune"] == cards["rollout"]
    assert sorted(cards["rollout"]) == [(0,), (1,), (2,), (3,)]
    assert cards["evaluate"] == cards["rollout"][:2]
    assert cards["reference"] == cards["reward"] == [()]


def test_engines_and_ranks_on_cards_of_their_own(ray_cluster: None) -> None:
    """The scorers, which ask for none, do not take card 0."""
    cards = seen(
        config("rollout.num_gpus=1", "learner.num_gpus=1", "rollout.num_workers=4", "learner.num_workers=4")
    )
    assert sorted(cards["rollout"] + cards["learner"]) == [(i,) for i in range(8)]
    assert cards["finetune"] == cards["learner"]
    assert cards["reference"] == cards["evaluate"] == cards["reward"] == [()]


def test_an_engine_of_two_cards_sees_both(ray_cluster: None) -> None:
    sets = (
        "rollout.num_gpus=1",
        "rollout.tensor_parallel=2",
        "rollout.transport=process_group",
        "learner.num_gpus=1",
        "rollout.num_workers=2",
    )
    cards = seen(config(*sets, "learner.num_workers=4"))
    assert [len(card) for card in cards["rollout"]] == [2, 2]
    assert sorted(chain.from_iterable(cards["rollout"] + cards["learner"])) == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper_math_qwen", "paper_safety_qwen", "paper_safety_mistral"])
def test_the_papers_recipes(ray_cluster: None, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_recipe(
        Path(models.ROOT) / "recipes" / f"{recipe}.yaml",
        [few for few in FEW_CPUS if not few.startswith("reference")],
    )
    cards = seen(asked)
    assert "reference" not in cards  # it is the learner's
    for role, workers in (
        ("rollout", asked.rollout),
        ("learner", asked.learner),
        ("evaluate", asked.evaluate),
    ):
        assert all(bool(card) == (workers.num_gpus > 0) for card in cards[role]), role
    assert len(set(cards["learner"])) == asked.learner.num_workers
