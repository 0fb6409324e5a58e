"""vLLM through the rollout worker's Sampler, apart from Ray, against vLLM alone and the learner."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_parts.card import has_card, time_call, used_gib
from gpu_parts.model import LENGTHS, RANK, SIZES, measure_gap, random_batch

COMPARED_GROUPS = 8
"""Whose log-probs while drawing are compared with a prefill of the same tokens."""


@dataclass(frozen=True)
class Batch:
    """What is drawn, by the Sampler and by vLLM alone."""

    sampler: Any
    prompts: list[Any]
    k: int
    """Completions of each prompt."""
    new: int
    """Tokens of each completion."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompts) * self.k * self.new

    def draw(self) -> list[Any]:
        """Groups, by index."""
        from frpo.types import Sampling, Ticket

        self.sampler.llm.reset_prefix_cache()
        self.sampler.label(0)
        sampling = Sampling(self.k, self.new, 1.0, 1.0, ())
        tickets = {}
        for number, prompt in enumerate(self.prompts):
            ticket = Ticket(number, prompt, 100 + number)
            tickets[self.sampler.begin(ticket, sampling, "batch")] = ticket
        while self.sampler.running:
            self.sampler.step()
        return [self.sampler.group_of(name, ticket) for name, ticket in tickets.items()]

    def draw_by_vllm_alone(self) -> None:
        from vllm import SamplingParams

        asked = []
        for i in range(len(self.prompts)):
            asked.append(
                SamplingParams(n=self.k, max_tokens=self.new, seed=100 + i, logprobs=0, detokenize=False)
            )
        self.sampler.llm.reset_prefix_cache()
        self.sampler.llm.generate(
            [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in self.prompts],
            asked,
            use_tqdm=False,
            lora_request=self.sampler.adapter,
        )


def measure_engine(work: Path, size: str) -> dict[str, Any]:
    """vLLM through the rollout worker's Sampler against vLLM alone, with an adapter and without; log-probs
    against the learner's."""
    figures: dict[str, Any] = {"gib": {"before": used_gib()}}
    figures["start_s"], sampler = time_call(lambda: _start_sampler(work))
    figures["gib"]["up"] = used_gib()
    load: dict[str, Callable[[], None]] = {
        "base": lambda: None,
        "adapter": lambda: sampler.load_policy(work / "adapter5"),
        "merged": lambda: sampler._merge(work / "adapter5"),
    }
    for field in ("tokens_per_s", "load_s", "same_tokens_again", "decode_against_prefill"):
        figures[field] = {}
    batch = _make_batch(sampler, size)
    for tag, call in load.items():
        figures["load_s"][tag], _ = time_call(call)
        drawn = batch.draw()
        seconds, again = time_call(batch.draw)
        figures["tokens_per_s"][tag] = {"frpo": batch.num_tokens / seconds}
        if tag != "merged":
            batch.draw_by_vllm_alone()
            seconds, _ = time_call(batch.draw_by_vllm_alone)
            figures["tokens_per_s"][tag]["vllm_alone"] = batch.num_tokens / seconds
        figures["same_tokens_again"][tag] = _share_of_same(drawn, again)
        figures["decode_against_prefill"][tag] = _compare_with_prefill(sampler, drawn[:COMPARED_GROUPS])
    sequences = random_batch(size, *LENGTHS[size][0])
    figures |= _compare_with_learner(sampler, sequences, work)
    if has_card():
        for kind, policy in (("full", work / "model"), ("adapter", work / "adapter5")):
            sampler.load_policy(policy)
            figures[f"sleep_{kind}"] = _measure_sleep(sampler, sequences)
    return figures


def _start_sampler(work: Path) -> Any:
    from frpo.config import LoraConfig, ModelConfig, RolloutConfig

    gpu = has_card()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    import frpo.actors._sampler as sampler_of

    sampler_of.export_stats = lambda engine: None  # it needs a cluster
    model = ModelConfig(path=str(work / "model"), dtype="bfloat16", lora=LoraConfig(rank=RANK, alpha=RANK))
    rollout = RolloutConfig(num_gpus=int(gpu), gpu_memory_utilization=0.7, sleep=gpu, max_num_seqs=256)
    return sampler_of.Sampler(str(work / "model"), model, rollout, 2048 if gpu else 64)


def _make_batch(sampler: Any, size: str) -> Batch:
    from frpo.types import Prompt

    rng = np.random.default_rng(0)
    count, length, k, new = (32, 300, 8, 256) if has_card() else (3, 8, 2, 8)
    prompts = []
    for i in range(count):
        tokens = rng.integers(3, SIZES[size]["vocab_size"], length).astype(np.int32)
        prompts.append(Prompt(f"p:{i}", "", tokens, "t", {}))
    return Batch(sampler, prompts, k, new)


def _completions_of(groups: Sequence[Any]) -> list[Any]:
    return list(itertools.chain.from_iterable(group.completions for group in groups))


def _share_of_same(drawn: Sequence[Any], again: Sequence[Any]) -> float:
    """Of the completions, those whose tokens are the same both times."""
    pairs = zip(_completions_of(drawn), _completions_of(again), strict=True)
    same = [bool(np.array_equal(first.token_ids, second.token_ids)) for first, second in pairs]
    return sum(same) / len(same)


def _compare_with_prefill(sampler: Any, groups: Sequence[Any]) -> dict[str, float]:
    """Log-probs that the tokens had when they were drawn, against those of the whole sequences at once."""
    from frpo.batching import flatten

    pairs = []
    for group in groups:
        pairs += [(group.prompt.token_ids, completion.token_ids) for completion in group.completions]
    decode = np.concatenate([completion.logprobs for completion in _completions_of(groups)])
    return measure_gap(decode, sampler.ranked(flatten(pairs))[0])


def _compare_with_learner(sampler: Any, sequences: Any, work: Path) -> dict[str, Any]:
    """The base's log-probs and those after updates, of the adapter applied unmerged and merged."""
    theirs = np.load(work / "logprobs.npz")
    sampler.load_policy(work / "model")
    base = sampler.ranked(sequences)[0]
    figures: dict[str, Any] = {"base_against_learner": measure_gap(theirs["before"], base)}
    for count in (1, 5):
        after = theirs[f"after{count}"]
        change = after - theirs["before"]
        sampler.load_policy(work / f"adapter{count}")
        by_adapter = sampler.ranked(sequences)[0]
        sampler._merge(work / f"adapter{count}")
        merged = sampler.ranked(sequences)[0]
        row: dict[str, Any] = {"learner_moved": float(np.abs(change).mean())}
        for how, now in (("adapter", by_adapter), ("merged", merged)):
            share = float((now - base) @ change / (change @ change))
            row[how] = measure_gap(after, now) | {"share_of_the_change": share}
        figures[f"after_{count}_updates"] = row
    return figures


def _measure_sleep(sampler: Any, sequences: Any) -> dict[str, float]:
    """What the card has back while the engine sleeps, and whether it wakes as it was."""
    before = sampler.ranked(sequences)[0]
    awake = used_gib()
    sleep_s, _ = time_call(sampler.sleep)
    asleep = used_gib()
    wake_s, _ = time_call(sampler.wake)
    return {
        "sleep_s": sleep_s,
        "wake_s": wake_s,
        "awake_gib": awake,
        "asleep_gib": asleep,
        "back_gib": used_gib(),
        "largest_change": float(np.abs(sampler.ranked(sequences)[0] - before).max()),
    }
