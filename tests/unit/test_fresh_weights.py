"""What is drawn comes from the weights that were asked for, and from no cache of others: the worker around a
fake engine."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors._sampler import Sampler
from actors.rollout import RolloutWorker, StaleWeights
from frpo.types import Prompt, Sampling

PROMPTS = [Prompt(f"p:{i}", "?", np.array([9, i], np.int32), "t", {}) for i in range(2)]


class FakeLLM:
    """vLLM as the sampler calls it: every request is done after one step, with one token."""

    def __init__(self, keeps_cache: bool = False) -> None:
        self.events: list[str] = []
        self.keeps_cache = keeps_cache
        self.llm_engine = self
        self.waiting: list[str] = []

    def reset_prefix_cache(self) -> bool:
        self.events.append("reset")
        return not self.keeps_cache

    def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None:
        self.events.append(f"request {name} with seed {params.seed}")
        self.waiting.append(name)

    def step(self) -> list[Any]:
        one = SimpleNamespace(
            token_ids=[3],
            logprobs=[{3: SimpleNamespace(logprob=-1.0)}],
            stop_reason=None,
            finish_reason="stop",
        )
        done = [SimpleNamespace(request_id=name, outputs=[one], finished=True) for name in self.waiting]
        self.waiting = []
        return done

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.events.append(method)


class Weights:
    """A parcel."""

    def deliver(self, sampler: Any) -> None:
        sampler.load([])


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    params = SimpleNamespace(SamplingParams=lambda **fields: SimpleNamespace(**fields))
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=0))
    monkeypatch.setitem(sys.modules, "vllm", params)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    return FakeLLM()


def worker_of(llm: FakeLLM) -> RolloutWorker:
    """A worker without a model: its sampler runs `llm`."""
    sampler: Any = Sampler.__new__(Sampler)
    sampler.llm, sampler.adapter, sampler.weights, sampler.max_model_len = llm, None, None, 8
    sampler.tokenizer = SimpleNamespace(
        batch_decode=lambda ids, skip_special_tokens: [str(row) for row in ids]
    )
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.sampler, worker.version = sampler, -1
    return worker


def draw(worker: RolloutWorker, version: int) -> list[tuple[int, int]]:
    """(index, version) of each group."""
    groups = worker.generate(PROMPTS, [4, 5], [40, 50], Sampling(1, 1), version)
    return [(group.index, group.policy_version) for group in itertools.chain.from_iterable(groups)]


def test_the_prefix_cache_is_emptied_before_each_batch(llm: FakeLLM) -> None:
    worker = worker_of(llm)
    worker.deliver(Weights(), 3)
    llm.events.clear()
    asked = ["reset", "request 4 with seed 40", "request 5 with seed 50"]
    assert draw(worker, 3) == [(4, 3), (5, 3)]
    assert llm.events == asked
    draw(worker, 3)
    assert llm.events == asked * 2  # the second batch as if the first had not been


def test_new_weights_find_no_cache_of_the_old_ones(llm: FakeLLM) -> None:
    worker = worker_of(llm)
    worker.deliver(Weights(), 3)
    assert llm.events == ["frpo_load", "reset"]
    assert worker.version == 3


def test_an_engine_that_keeps_its_cache_is_not_drawn_from(llm: FakeLLM) -> None:
    llm.keeps_cache = True
    worker = worker_of(llm)
    with pytest.raises(RuntimeError, match="kept its prefix cache"):
        worker.deliver(Weights(), 3)
    assert worker.version == -1  # so that nobody draws


@pytest.mark.parametrize("asked", [0, 2, 4])
def test_a_worker_that_runs_other_weights_draws_nothing(llm: FakeLLM, asked: int) -> None:
    worker = worker_of(llm)
    worker.deliver(Weights(), 3)
    llm.events.clear()
    with pytest.raises(StaleWeights, match=f"runs policy version 3, asked for {asked}"):
        draw(worker, asked)
    assert llm.events == []
    assert draw(worker, 3) == [(4, 3), (5, 3)]


def test_a_worker_that_has_started_anew_draws_nothing(llm: FakeLLM) -> None:
    with pytest.raises(StaleWeights, match="runs policy version -1, asked for 0"):
        draw(worker_of(llm), 0)
