"""Drawing ahead on real vLLM: each token by the version that it says, over a publish and over a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frpo.actors.rollout import RolloutPool
from frpo.actors.transport.store import put_tensors
from frpo.batching import flatten
from frpo.roles import DrawSession
from frpo.seeds import derive
from frpo.types import Completion, Group, Prompt, Ticket
from tests.support import models
from tests.support.engines import SAMPLING, completions_of, draw_over_a_publish, largest_gap


def begin(session: DrawSession, prompts: list[Prompt], version: int, first: int = 0) -> None:
    for number, prompt in enumerate(prompts, first):
        session.begin(Ticket(number, prompt, derive(0, number)), version)


def collect(session: DrawSession, count: int) -> list[Group]:
    """As many groups, by number; what was lost is left out."""
    drawn: list[Group] = []
    while len(drawn) < count:
        drawn += session.wait().groups
    return sorted(drawn, key=lambda group: group.index)


def gap(model: Any, group: Group, completion: Completion) -> float:
    """Largest difference of a token's log-prob to that of `model`."""
    truth = models.naive_logprobs(model, flatten([(group.prompt.token_ids, completion.token_ids)]))
    return float(abs(completion.logprobs - truth).max())


def test_draws_are_the_policys_and_equal_seeds_give_equal_draws(pool: RolloutPool, tiny_model: Path) -> None:
    model, tokenizer = models.load_hf(tiny_model)
    pool.load_policy(tiny_model, 1)
    prompts = models.prompts(tokenizer, 6)
    drawn = []
    for _ in range(2):
        session = pool.open(SAMPLING)
        begin(session, prompts, 1)
        drawn.append(collect(session, 6))
        session.close()
    for one, other in zip(*drawn, strict=True):
        assert one.index == other.index
        for mine, theirs in zip(one.completions, other.completions, strict=True):
            assert mine.token_ids.tolist() == theirs.token_ids.tolist()
            assert gap(model, one, mine) < 1e-4


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_publish_in_the_middle_of_completions(pool: RolloutPool, tiny_model: Path, in_flight: bool) -> None:
    """Tokens of the old version have its log-probs; a completion of the new one alone has the new one's. What
    began under the old one goes on, or is finished."""
    old, tokenizer = models.load_hf(tiny_model)
    new = models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed=2)
    pool.load_policy(tiny_model, 1)
    prompts = models.prompts(tokenizer, 10)
    parcel = put_tensors(new.named_parameters())
    drawn = draw_over_a_publish(pool, prompts[:6], prompts[6:], parcel, in_flight=in_flight)
    spans = {tuple(np.unique(c.versions).tolist()) for c in completions_of(drawn)}
    assert spans >= ({(1, 2), (2,)} if in_flight else {(1,), (2,)})
    assert ((1, 2) in spans) == in_flight
    for group in drawn:
        assert group.policy_version == (1 if group.index < 6 else 2)
        for completion in group.completions:
            pair = [(group.prompt.token_ids, completion.token_ids)]
            before = completion.versions == 1
            assert (np.diff(completion.versions) >= 0).all()
            by_old, by_new = (models.naive_logprobs(model, flatten(pair)) for model in (old, new))
            assert abs(completion.logprobs - by_old)[before].max(initial=0) < 1e-4
            if not before.any():
                assert abs(completion.logprobs - by_new).max() < 1e-4


def test_a_killed_engine_loses_its_prompts_and_draws_by_the_current_weights_when_it_is_back(
    pool: RolloutPool, tiny_model: Path
) -> None:
    _, tokenizer = models.load_hf(tiny_model)
    model = models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed=11)
    pool.deliver(put_tensors(model.named_parameters()), 4)
    session = pool.open(SAMPLING)
    prompts = models.prompts(tokenizer, 24)
    begin(session, prompts, 4)
    (process,) = pool.members()
    arrivals = session.wait()
    os.kill(process.pid, signal.SIGKILL)
    groups, lost = list(arrivals.groups), list(arrivals.lost)
    while len(groups) + len(lost) < 24:
        arrivals = session.wait()
        groups += arrivals.groups
        lost += arrivals.lost
    assert lost
    while not session.room:
        session.wait()
    for number in lost:
        session.begin(Ticket(number, prompts[number], derive(0, number)), 4)
    groups += collect(session, len(lost))
    assert sorted(group.index for group in groups) == list(range(24))
    assert max(largest_gap(model, pool, groups)) < 1e-4
    assert pool.members() != (process,)
    session.close()
