"""What is drawn comes from the weights that were asked for, and from no cache of others: the worker around a
fake engine."""

from __future__ import annotations

import asyncio
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from frpo.actors._drawing import StaleWeights
from frpo.actors._sampler import Sampler
from frpo.actors.rollout import RolloutWorker
from frpo.types import Group, Prompt, Sampling, Ticket

PROMPTS = [Prompt(f"p:{i}", "?", np.array([9, i], np.int32), "t", {}) for i in range(2)]


class FakeLLM:
    """vLLM as the sampler calls it: a request of a prompt of n tokens draws a token at each of n steps, each
    by the weights that the engine says it runs then."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.llm_engine = self
        self.label = "none"
        self.running: dict[str, tuple[int, list[str]]] = {}

    def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None:
        ids = prompt["prompt_token_ids"]
        self.events.append(f"{ids} with seed {params.seed} under {prompt['cache_salt']}")
        self.running[name] = (len(ids), [])

    def step(self) -> list[Any]:
        done = []
        for name, (length, labels) in list(self.running.items()):
            labels.append(self.label)
            if len(labels) == length:
                del self.running[name]
                done.append(SimpleNamespace(request_id=name, outputs=[output_of(labels)], finished=True))
        return done

    def abort_request(self, names: list[str]) -> None:
        self.events.append(f"gave up {len(names)}")
        for name in names:
            del self.running[name]

    def set_weight_version(self, label: str) -> None:
        self.label = label

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.events.append(f"{method} beside {len(self.running)}")


def output_of(labels: list[str]) -> Any:
    """As vLLM's CompletionOutput; its tokens are all 3."""
    spans, start = [], 0
    for label, part in itertools.groupby(labels):
        end = start + len(list(part))
        spans.append(SimpleNamespace(version=label, start=start, end=end))
        start = end
    return SimpleNamespace(
        token_ids=[3] * len(labels),
        logprobs=[{3: SimpleNamespace(logprob=-1.0)}] * len(labels),
        stop_reason=None,
        finish_reason="stop",
        weight_versions=spans,
    )


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


def worker_of(llm: FakeLLM, *, in_flight: bool = True, version: int | None = None) -> RolloutWorker:
    """A worker without a model: its sampler runs `llm`."""
    sampler: Any = Sampler.__new__(Sampler)
    sampler.llm, sampler.adapter, sampler.weights, sampler.max_model_len = llm, None, None, 8
    sampler.num_requests, sampler.running, sampler.finished = 0, set(), {}
    sampler.tokenizer = SimpleNamespace(
        batch_decode=lambda ids, skip_special_tokens: [str(row) for row in ids]
    )
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.sampler, worker.in_flight, worker.version = sampler, in_flight, -1
    worker.num_batches = 0
    worker.runner = None
    if version is not None:
        worker.deliver(Weights(), version)
        llm.events.clear()
    return worker


def draw(worker: RolloutWorker, version: int) -> list[tuple[int, int]]:
    """(index, version) of each group of a batch."""

    async def run() -> list[Group]:
        drawn: list[Group] = []
        async for groups in worker.generate(PROMPTS, [4, 5], [40, 50], Sampling(1, 1), version):
            drawn += groups
        return drawn

    return [(group.index, group.policy_version) for group in asyncio.run(run())]


def test_a_batch_finds_nothing_of_another_in_the_cache(llm: FakeLLM) -> None:
    worker = worker_of(llm, version=3)
    assert draw(worker, 3) == [(4, 3), (5, 3)]
    assert draw(worker, 3) == [(4, 3), (5, 3)]
    assert llm.events == [
        "[9, 0] with seed 40 under batch 1",
        "[9, 1] with seed 50 under batch 1",
        "[9, 0] with seed 40 under batch 2",
        "[9, 1] with seed 50 under batch 2",
    ]


@pytest.mark.parametrize("asked", [0, 2, 4])
def test_a_worker_that_runs_other_weights_draws_nothing(llm: FakeLLM, asked: int) -> None:
    worker = worker_of(llm, version=3)
    with pytest.raises(StaleWeights, match=f"runs policy version 3, asked for {asked}"):
        draw(worker, asked)
    assert llm.events == []
    assert draw(worker, 3) == [(4, 3), (5, 3)]


def test_a_worker_that_has_started_anew_draws_nothing(llm: FakeLLM) -> None:
    with pytest.raises(StaleWeights, match="runs policy version -1, asked for 0"):
        draw(worker_of(llm), 0)
    with pytest.raises(StaleWeights, match="runs policy version -1, asked for 0"):
        asyncio.run(worker_of(llm).draw(LONG, Sampling(1, 4), 0))


LONG = Ticket(7, Prompt("p:7", "?", np.array([9, 9, 9, 9], np.int32), "t", {}), 70)
"""Draws four tokens."""


def draw_over_a_publish(worker: RolloutWorker, after: int) -> list[int]:
    """The versions of four tokens, where version 4 arrives after some of them."""

    async def run() -> Group:
        drawing = asyncio.create_task(worker.draw(LONG, Sampling(1, 4), 3))
        while len(next(iter(worker.sampler.llm.running.values()), (0, []))[1]) < after:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        worker.deliver(Weights(), 4)
        return await drawing

    group = asyncio.run(run())
    assert group.index == 7
    return group.completions[0].versions.tolist()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_each_token_has_the_version_that_drew_it(llm: FakeLLM, after: int) -> None:
    worker = worker_of(llm, version=3)
    assert draw_over_a_publish(worker, after) == [3] * after + [4] * (4 - after)
    assert llm.events == ["[9, 9, 9, 9] with seed 70 under batch 1", "frpo_load beside 1"]


def test_an_engine_may_finish_what_it_has_begun_before_it_takes_new_weights(llm: FakeLLM) -> None:
    worker = worker_of(llm, version=3, in_flight=False)
    assert draw_over_a_publish(worker, 2) == [3, 3, 3, 3]
    assert llm.events[-1] == "frpo_load beside 0"


def test_new_weights_find_no_cache_of_the_old_ones(llm: FakeLLM) -> None:
    worker = worker_of(llm, version=3)
    asyncio.run(worker.draw(LONG, Sampling(1, 4), 3))
    worker.runner = None  # of another loop of events
    worker.deliver(Weights(), 4)
    asyncio.run(worker.draw(LONG, Sampling(1, 4), 4))
    salts = [event.split("under ")[1] for event in llm.events if "under" in event]
    assert salts == ["batch 1", "batch 2"]


def test_draws_run_side_by_side_and_a_batch_beside_them(llm: FakeLLM) -> None:
    worker = worker_of(llm, version=3)

    async def run() -> tuple[list[Group], list[int]]:
        others = [
            asyncio.create_task(worker.draw(replace(LONG, number=n), Sampling(1, 4), 3)) for n in (8, 9)
        ]
        await asyncio.sleep(0)
        order = []
        async for groups in worker.generate(PROMPTS, [0, 1], [1, 2], Sampling(1, 2), 3):
            order += [group.index for group in groups]
        return [await other for other in others], order

    drawn, batch = asyncio.run(run())
    assert [group.index for group in drawn] == [8, 9]
    assert batch == [0, 1]
    assert worker.sampler.finished == {}


def test_what_is_given_up_is_not_answered(llm: FakeLLM) -> None:
    worker = worker_of(llm, version=3)

    async def run() -> None:
        drawing = asyncio.create_task(worker.draw(LONG, Sampling(1, 4), 3))
        await asyncio.sleep(0)
        worker.give_up()
        with pytest.raises(asyncio.CancelledError):
            await drawing

    asyncio.run(run())
    assert llm.events[-1] == "gave up 1"
    assert llm.running == {}
