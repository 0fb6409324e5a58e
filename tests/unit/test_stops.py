"""What ends a run: each limit from both sides, and whose number it names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frpo.batching import flatten
from frpo.recipe import load_recipe
from frpo.stats import BatchStats
from frpo.stops import (
    RunStopped,
    measure_parity_gap,
    stop_if_batch_is_broken,
    stop_if_engines_differ,
    stop_if_rewards_fail,
    stop_if_update_is_broken,
)
from frpo.types import RolloutBatch
from tests.support.builders import metrics

CONFIG = load_recipe(
    "recipes/testbed.yaml",
    ("max_failed_rewards=0.25", "rollout.max_mismatch_kl=0.5", "rollout.parity_tolerance=0.25"),
)


def stats_of(**changed: Any) -> BatchStats:
    return metrics(1, **{"num_prompts": 4, "num_completions": 8, "dropped_groups": 0, **changed}).batch


def test_as_many_rewards_may_fail_as_are_allowed() -> None:
    stop_if_rewards_fail(CONFIG, stats_of(failed_rewards=2), 3)
    with pytest.raises(RunStopped) as stopped:
        stop_if_rewards_fail(CONFIG, stats_of(failed_rewards=3, errors=("a: late", "b: nan")), 3)
    assert str(stopped.value) == "step 3: 3 of 8 rewards failed (max_failed_rewards = 0.25): a: late; b: nan"


def test_a_batch_of_which_nothing_is_left_names_what_cut_it() -> None:
    stop_if_rewards_fail(CONFIG, stats_of(failed_rewards=0, dropped_groups=3), 3)
    cut = stats_of(failed_rewards=0, dropped_groups=4, errors=(), cut_share=0.5)
    with pytest.raises(RunStopped) as stopped:
        stop_if_rewards_fail(CONFIG, cut, 3)
    assert str(stopped.value) == (
        "step 3: 0 of 8 rewards failed (max_failed_rewards = 0.25): every group was left with fewer than two "
        "completions that train; 50% of all are cut at rollout.max_new_tokens = 7: raise it, or set "
        "objective.cut to keep"
    )


def batch_of(advantages: tuple[float, ...] = (1.0, -1.0), **logprobs: float) -> RolloutBatch:
    """One token a completion, `logprobs` of the first by who gave them."""
    tokens = np.array([5], np.int32)
    given = {who: np.array([logprobs.get(who, -1.0), -1.0]) for who in ("engine", "learner", "reference")}
    return RolloutBatch(
        flatten([(tokens, tokens)] * 2),
        np.array(advantages),
        given["engine"],
        given["learner"],
        given["reference"],
        fresh=np.ones(2, bool),
        betas=np.ones(2),
    )


@pytest.mark.parametrize("who", ["engine", "learner", "reference"])
def test_a_log_prob_that_is_none_is_said_of_whoever_gave_it(who: str) -> None:
    with pytest.raises(RunStopped, match=f"^step 2: a log-prob of the {who} is nan: the weights or the"):
        stop_if_batch_is_broken(batch_of(**{who: float("nan")}), stats_of(), 2)


def test_a_batch_may_be_empty_but_no_advantage_infinite() -> None:
    stop_if_batch_is_broken(batch_of(), stats_of(), 2)
    stop_if_batch_is_broken(batch_of(advantages=()), stats_of(), 2)
    with pytest.raises(RunStopped, match=r"^step 2: an advantage is inf: rewards are too large"):
        stop_if_batch_is_broken(batch_of(advantages=(1.0, -float("inf"))), stats_of(), 2)


def test_a_mismatch_may_be_as_large_as_the_limit() -> None:
    limit = CONFIG.rollout.mismatch_limit
    stop_if_update_is_broken(CONFIG, metrics(1, mismatch_kl=limit).update, 2)
    with pytest.raises(RunStopped, match=r"^step 2: KL\(engine \|\| learner\) is 0\.5 nats per token"):
        stop_if_update_is_broken(CONFIG, metrics(1, mismatch_kl=np.nextafter(limit, 1)).update, 2)


def test_engines_may_differ_by_the_tolerance_the_furthest_by_its_mean_over_tokens() -> None:
    learner = np.array([-1.0, -2.0])
    engines = np.array([[-1.0, -2.0], [-0.5, -2.0]])
    assert measure_parity_gap(engines, learner) == 0.25
    stop_if_engines_differ(CONFIG, engines, learner, 2)
    with pytest.raises(RunStopped, match=r"^step 2: engine and learner differ by 0\.375 nats a token"):
        stop_if_engines_differ(CONFIG, np.array([[-1.25, -2.5]]), learner, 2)
