"""Roles that hold one GPU in turn: who leaves before who comes, what waits for its turn, and frozen weights
there and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frpo.actors import _vllm
from frpo.actors._calls import Actors
from frpo.actors._host import Host, frozen_tensors
from frpo.actors.learner import LearnerPool
from frpo.actors.reference import ReferencePool
from frpo.cluster import take_turns
from frpo.planning import plan_run
from frpo.types import Group
from tests.support.fakes import FakePrompts, Now
from tests.support.recipes import SHARED, config


@dataclass
class Pool:
    """Says what is asked of it."""

    name: str
    said: list[str]
    takes_turns: bool = False
    actors: Any = field(default_factory=lambda: SimpleNamespace(turn=lambda: None))

    def _say(self, what: str) -> None:
        self.actors.turn()  # as the calls of a real pool do
        self.said.append(f"{self.name} {what}")

    def __getattr__(self, what: str) -> Any:
        if what in ("sleep", "wake", "offload", "reload", "work"):
            return partial(self._say, what)
        raise AttributeError(what)


def test_whoever_is_called_next_has_the_card_and_all_others_have_left_it() -> None:
    said: list[str] = []
    roles = ("rollout", "learner", "finetune", "evaluate", "reference")
    pools = {role: Pool(role, said) for role in roles}
    take_turns(plan_run(config(*SHARED, "evaluate.num_gpus=1", "reference.num_gpus=1")), pools)
    for role in ("rollout", "reference", "reference", "learner", "rollout", "evaluate"):
        pools[role].work()
    assert said == [
        "rollout work",
        "rollout sleep",
        "reference reload",
        "reference work",
        "reference work",
        "reference offload",
        "learner reload",
        "learner work",
        "learner offload",
        "rollout wake",
        "rollout work",
        "rollout sleep",
        "evaluate reload",
        "evaluate work",
    ]
    assert pools["reference"].takes_turns


def test_an_engine_that_is_restarted_waits_until_its_card_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([10, 40, 72])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free) << 30, 80 << 30))
    monkeypatch.setattr(_vllm.time, "sleep", lambda seconds: None)
    _vllm.wait_for_memory(0.9)
    assert list(free) == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 << 30, 80 << 30))
    monkeypatch.setattr(_vllm, "MEMORY_LIMIT_S", 0.0)
    with pytest.raises(
        RuntimeError,
        match=r"10.0 of 80.0 GiB of the GPU were free, and an engine takes 90% of it; "
        r"lower rollout.gpu_memory",
    ):
        _vllm.wait_for_memory(0.9)


def test_the_bits_are_asked_for_of_engines_on_cards_alone() -> None:
    """Of all others by torch, in their own process."""
    for sets, there in ((("rollout.num_gpus=1",), True), ((), False)):
        assert (
            "VLLM_BATCH_INVARIANT" in _vllm.vllm_environment(config(*sets, "model.deterministic=true"))
        ) == there
    assert "VLLM_BATCH_INVARIANT" not in _vllm.vllm_environment(config("rollout.num_gpus=1"))


def test_an_engine_whose_weights_change_in_the_middle_returns_a_token_in_the_step_that_draws_it() -> None:
    """Else vLLM schedules ahead on a card, and the token would have the label of newer weights."""

    def settings(*sets: str) -> dict[str, Any]:
        asked = config("rollout.num_gpus=1", *sets)
        return _vllm.engine_settings(asked.model, asked.rollout)

    assert settings("rollout.staleness=1")["async_scheduling"] is False
    assert "async_scheduling" not in settings("rollout.staleness=1", "rollout.in_flight=false")
    assert "async_scheduling" not in settings()


def test_a_role_without_gpus_never_takes_the_card() -> None:
    said: list[str] = []
    pools = {role: Pool(role, said) for role in ("rollout", "learner", "finetune", "evaluate", "reference")}
    take_turns(plan_run(config(*SHARED)), pools)
    pools["reference"].work()
    assert said == ["reference work"]
    assert not pools["reference"].takes_turns


def test_scorers_are_asked_when_all_is_drawn_where_they_share_the_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, list[int]]] = []

    def call(self: Any, worker: int, method: Any, *args: Any) -> Now:
        blocks = args[-1][worker::2] if method.__name__ == "score_together" else args[-1]
        asked.append((worker, [group.index for group in chain.from_iterable(blocks)]))
        return Now([[(g.index,) for g in block] for block in blocks])

    monkeypatch.setattr(Actors, "call", call)
    nobody: Any = None
    reference_pool = ReferencePool([nobody, nobody], timeout_s=1, restarts=0)
    learner = LearnerPool([nobody, nobody], timeout_s=1)
    groups = [Group(i, prompt, ()) for i, prompt in enumerate(FakePrompts(3).take(0))]
    for pool in (reference_pool, learner):
        asked.clear()
        assert pool.score(groups[1]).result() == (1,)
        assert asked == [(1, [1])]  # by one of them at once
        pool.takes_turns = True
        pending = [pool.score(g) for g in groups]
        assert asked == [(1, [1])]
        assert not any(p.ready() for p in pending)
        assert [p.result() for p in reversed(pending)] == [(2,), (1,), (0,)]
        assert asked[1:] == [(0, [0, 2]), (1, [1])]
        assert pool.score(groups[1]).result() == (1,)  # and those of the next step anew
    learner.takes_turns, learner.together = False, True
    asked.clear()
    pending = [learner.score(g) for g in groups]
    assert asked == []
    assert [p.result() for p in pending] == [(0,), (1,), (2,)]
    assert asked == [(0, [0, 2]), (1, [1])]


def test_frozen_weights_leave_and_come_back_and_the_trained_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = model[0].bias.data_ptr()
    frozen = frozen_tensors(model)
    assert len(frozen) == 4  # a matrix, and the norm's statistics
    host = Host(torch.device("cpu"), frozen=True)
    for _ in range(2):
        where = model[0].weight.data_ptr()
        host.take(frozen)
        assert model[0].weight.data_ptr() != where
        host.give()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[0].bias.data_ptr() == trained
    assert len(host.host) == 4
    np.testing.assert_array_equal(model(torch.ones(2, 4)).detach().shape, (2, 4))
