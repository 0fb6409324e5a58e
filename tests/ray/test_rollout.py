"""The rollout worker on real vLLM: log-probs, seeds, both ways of publishing, and a kill in the middle of a
batch."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from peft import PeftModel, PromptTuningConfig

from frpo.actors._calls import Actors
from frpo.actors._publish import GroupPublisher
from frpo.actors.rollout import RolloutPool
from frpo.actors.transport import group
from frpo.actors.transport.group import Announced
from frpo.actors.transport.store import put_tensors
from frpo.batching import flatten
from frpo.config import ConfigError
from frpo.roles import WorkerFailed
from frpo.seeds import derive
from frpo.types import Group, Prompt
from tests.support import models
from tests.support.engines import SAMPLING, completions_of, draw, largest_gap
from tests.support.policies import lora, write_adapter


@pytest.fixture(scope="module")
def hf(tiny_model: Path) -> tuple[Any, Any]:
    return models.load_hf(tiny_model)


def tokens(groups: list[Group]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions_of(groups)]


def test_groups_logprobs_and_seeds(pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path) -> None:
    model, tokenizer = hf
    pool.load_policy(tiny_model, 3)
    prompts = models.prompts(tokenizer, 6)
    groups = draw(pool, prompts, 3)
    assert [(g.index, g.prompt.id, g.policy_version, len(g.completions)) for g in groups] == [
        (i, f"p:{i}", 3, 4) for i in range(6)
    ]
    for completion in completions_of(groups):
        ended = completion.token_ids[-1] == tokenizer.eos_token_id
        assert completion.finish_reason == ("stop" if ended else "length")
        assert (
            len(completion.token_ids)
            == len(completion.logprobs)
            == (len(completion.token_ids) if ended else 7)
        )
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert max(largest_gap(model, pool, groups)) < 1e-4
    assert tokens(draw(pool, prompts, 3)) == tokens(groups)
    assert tokens(draw(pool, prompts, 3, seed=1)) != tokens(groups)
    assert len({tuple(t) for t in tokens(groups)}) > 20  # completions of a group are independent draws


def test_an_adapter_is_applied_as_by_peft(
    pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path, tmp_path: Path
) -> None:
    config = lora(use_dora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 64})
    adapter = write_adapter(tmp_path / "dora", tiny_model, config)
    data = models.sequences(12, seed=3)
    truth = models.naive_logprobs(
        PeftModel.from_pretrained(models.load_hf(tiny_model)[0], adapter).eval(), data
    )
    assert abs(truth - models.naive_logprobs(hf[0], data)).max() > 0.01
    pool.load_policy(adapter, 6)
    np.testing.assert_allclose(pool.logprobs(data)[0], truth, atol=1e-4)
    prompted = write_adapter(
        tmp_path / "prompt", tiny_model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(ConfigError, match="PROMPT_TUNING cannot be merged"):
        pool.load_policy(prompted, 7)


def test_a_stop_string_hit_at_once_leaves_no_text(
    pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path
) -> None:
    pool.load_policy(tiny_model, 3)
    prompts = models.prompts(hf[1], 2)
    word = hf[1].decode(draw(pool, prompts, 3)[0].completions[0].token_ids[:1])
    groups = list(
        pool.generate(prompts, [derive(0, i) for i in range(2)], replace(SAMPLING, stop=(word,)), 3)
    )
    found = completions_of(groups)
    assert ("", 1) in [(c.text, len(c.token_ids)) for c in found]
    assert not any(word in c.text for c in found)


@pytest.mark.parametrize("way", ["object_store", "policy_folder"])
def test_after_a_publish_the_engine_runs_the_new_weights_tied_head_included(
    pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path, tmp_path: Path, way: str
) -> None:
    """Fails when the re-packing of the tied lm_head is taken out of WeightLoader.frpo_load."""
    _, tokenizer = hf
    model = models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed=len(way))
    if way == "object_store":
        pool.deliver(put_tensors(model.named_parameters()), 7)
    else:
        model.save_pretrained(tmp_path)
        pool.load_policy(tmp_path, 7)
    assert max(largest_gap(model, pool, draw(pool, models.prompts(tokenizer, 6), 7))) < 1e-4


class Sender:
    """Rank 0 of a weight group, in a process of its own, with the methods of a TrainWorker."""

    rank = 0

    def __init__(self, folder: str) -> None:
        self.folder, self.transport = Path(folder), group.GroupTransport()

    def change(self, seed: int) -> None:
        self.model = models.perturbed(models.load_hf(self.folder)[0], 0.5, seed)

    def named_weights(self) -> Any:
        return self.model.named_parameters()

    def address(self) -> tuple[str, int]:
        return group.free_address()

    def open_weight_group(self, host: str, port: int, size: int, backend: str) -> None:
        self.transport.open(host, port, size, backend)

    def announce(self, name: str) -> Announced:
        engine: Any = self
        return self.transport.announce(engine, name)

    def pack(self) -> None:
        engine: Any = self
        self.transport.pack(engine)


def test_weights_arrive_by_process_group_whoever_dies_in_a_broadcast(
    pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = ray.remote(Sender).options(num_cpus=0).remote(str(tiny_model))
    source: Any = SimpleNamespace(processes=[0], actors=Actors("sender", [sender], timeout_s=100))
    publisher = GroupPublisher("learner", source, pool, "gloo")
    prompts = models.prompts(hf[1], 6)
    settle = pool.settle

    def die() -> None:
        monkeypatch.setattr(pool, "settle", settle)
        os.kill(pool.members()[0].pid, signal.SIGKILL)

    def die_and_be_asked_again() -> None:
        die()
        pool.settle()  # the new process answers, which is in no group

    members = []
    for seed, then in enumerate((settle, die, die_and_be_asked_again)):
        monkeypatch.setattr(pool, "settle", then)
        ray.get(sender.change.remote(seed), timeout=60)
        publisher.publish(20 + seed)
        model = models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed)
        assert max(largest_gap(model, pool, draw(pool, prompts, 20 + seed))) < 1e-4
        members.append(pool.members())
    assert len(set(members)) == 3
    ray.kill(sender)


def test_a_prompt_that_does_not_fit_is_named(
    pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path
) -> None:
    pool.load_policy(tiny_model, 1)
    long = Prompt("set:12", "x", np.full(40, 7, np.int32), "t", {})
    with pytest.raises(
        WorkerFailed, match=r"rollout worker 0 failed in generate.*prompt set:12: 40 tokens and 7 new ones"
    ):
        draw(pool, [long], 1)
    assert len(draw(pool, models.prompts(hf[1], 2), 1)) == 2  # the engine is none the worse


def test_a_worker_killed_in_the_middle_of_a_batch_yields_the_same_groups(
    pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path
) -> None:
    _, tokenizer = hf
    model = models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed=11)
    pool.deliver(put_tensors(model.named_parameters()), 4)
    prompts = models.prompts(tokenizer, 40)
    undisturbed = tokens(draw(pool, prompts, 4))
    (process,) = pool.members()
    arrived = []
    for drawn in pool.generate(prompts, [derive(0, i) for i in range(40)], SAMPLING, 4):
        arrived.append(drawn)
        if len(arrived) == 1:
            os.kill(process.pid, signal.SIGKILL)
    assert pool.members() != (process,)
    assert sorted(g.index for g in arrived) == list(range(40))
    assert tokens(sorted(arrived, key=lambda g: g.index)) == undisturbed


def test_a_worker_killed_between_calls_answers_by_the_current_weights(
    pool: RolloutPool, tiny_model: Path, tmp_path: Path
) -> None:
    """Not by those that it started from."""
    model = models.perturbed(models.load_hf(tiny_model)[0], 0.5, seed=13)
    model.save_pretrained(tmp_path)
    pool.load_policy(tmp_path, 5)
    data = models.sequences(6)
    before = pool.logprobs(data)
    (process,) = pool.members()
    os.kill(process.pid, signal.SIGKILL)
    np.testing.assert_allclose(pool.logprobs(data), before, atol=1e-6)
    assert abs(before[0] - models.naive_logprobs(model, data)).max() < 1e-4


def test_the_harness_model_scores_and_generates_as_transformers_does(
    pool: RolloutPool, hf: tuple[Any, Any], tiny_model: Path
) -> None:
    """Sums of log-probs, what is greedy, and greedy text, through lm-evaluation-harness's interface."""
    import torch
    from lm_eval.api.instance import Instance

    from frpo.actors._engine_lm import VERSION, EngineLM

    model, tokenizer = hf
    pool.load_policy(tiny_model, VERSION)
    lm = EngineLM(pool, str(tiny_model), 16, 0)
    prompts = models.prompts(tokenizer, 4)
    texts, greedy = [], []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        greedy.append(out.tolist())
        texts.append(tokenizer.decode(out, skip_special_tokens=True))
    kwargs = {"until": [], "max_gen_toks": 5, "do_sample": False}
    asked = [Instance("generate_until", {}, (p.text, kwargs), i) for i, p in enumerate(prompts)]
    assert lm.generate_until(asked) == texts
    word = texts[0].split()[1]
    stopped = [Instance("generate_until", {}, (prompts[0].text, {**kwargs, "until": [word]}), 0)]
    assert lm.generate_until(stopped)[0].strip() == texts[0].split(word)[0].strip()

    other = [[*g[:-1], (g[-1] + 1) % 100 + 5] for g in greedy]
    rows = [(None, p.token_ids.tolist(), c) for p, c in zip(prompts * 2, greedy + other, strict=True)]
    found = lm._loglikelihood_tokens(rows)
    data = flatten([(np.array(p, np.int32), np.array(c, np.int32)) for _, p, c in rows])
    sums = [
        part.sum()
        for part in np.split(models.naive_logprobs(model, data), np.cumsum([len(c) for *_, c in rows])[:-1])
    ]
    np.testing.assert_allclose([value for value, _ in found], sums, atol=1e-4)
    assert [is_greedy for _, is_greedy in found] == [True] * 4 + [False] * 4
