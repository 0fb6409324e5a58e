"""Fine-tune workers: supervised training of a saved policy on the learner's engine (base stage, downstream
tasks)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ray.actor import ActorHandle

from frpo.actors._calls import put_once
from frpo.actors._train import TrainPool, TrainWorker
from frpo.batching import join_sequences
from frpo.config import DownstreamSft, FinetuneConfig, ModelConfig
from frpo.stats import FinetuneStats
from frpo.types import Anchor, Sequences

if TYPE_CHECKING:
    from torch import Tensor

    from frpo.actors._way import Way
    from frpo.packing import Pack


def without_prompts(sequences: Sequences) -> Sequences:
    """The same sequences with every token but the first as completion."""
    return Sequences(sequences.tokens, np.ones_like(sequences.prompt_lengths), sequences.lengths)


@dataclass(frozen=True)
class Terms:
    """Of the loss of an update: first of a micro-batch, then of all of one rank, then of all ranks."""

    likelihood: float = 0.0
    """Mean negative log-likelihood, nats per token of the examples."""
    kl: float = 0.0
    """nats per token of the anchor."""

    def __add__(self, other: Terms) -> Terms:
        return Terms(self.likelihood + other.likelihood, self.kl + other.kl)


class FinetuneWorker(TrainWorker):
    """One rank."""

    way: Way | None = None

    def start(self, policy: str, model: ModelConfig, finetune: FinetuneConfig, seed: int) -> None:
        """All ranks: a fresh optimiser on a saved policy. With model.lora a fresh adapter is trained on
        it."""
        from frpo.actors._engine import Engine
        from frpo.actors._way import way_from

        self._check_joined()
        self.stop()
        self.finetune = finetune
        self.engine = Engine(Path(policy), model, finetune, finetune.num_steps, seed, dropout=True)
        if isinstance(finetune, DownstreamSft) and finetune.interpolate:
            self.way = way_from(self.engine)

    def update(self, sequences: Sequences, anchor: Anchor | None = None) -> FinetuneStats:
        """All ranks: one optimiser update on the mean negative log-likelihood per completion token of the
        batch; with an anchor, kl_to_policy times the KL from the start, mean over the anchor's tokens, is
        added."""
        from frpo.objective import kl_from_start
        from frpo.packing import pad_packs, pad_values

        began = time.perf_counter()
        engine = self._engine()
        examples = self._trained_on(sequences)
        weight = self.finetune.kl_to_policy if isinstance(self.finetune, DownstreamSft) else 0.0
        everything = join_sequences(examples, anchor.sequences) if anchor else examples

        def loss(packs: list[Pack]) -> tuple[Tensor, Terms]:
            now = engine.forward(pad_packs(everything, packs, engine.device)).logprobs
            if anchor is None:
                value = -now.sum() / examples.num_completion_tokens
                return value, Terms(float(value.detach()))
            rows = np.concatenate(packs)
            own = rows >= len(examples)
            value = -now[~own].sum() / examples.num_completion_tokens
            drawn = rows[own] - len(examples)
            start = pad_values(anchor.logprobs, anchor.sequences, drawn, now.shape[1]).to(now.device)
            kl = kl_from_start(now[own], start) / anchor.sequences.num_completion_tokens
            return value + weight * kl, Terms(float(value.detach()), float(kl.detach()))

        result, told = engine.step(engine.share(everything), loss)
        terms = Terms(*engine.reduce(astuple(sum(told, Terms()))))
        return FinetuneStats(
            loss=terms.likelihood,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            num_tokens=int(everything.lengths.sum()),
            seconds=time.perf_counter() - began,
            kl=terms.kl if anchor else None,
        )

    def interpolate(self, share: float) -> None:
        """All ranks, after the last update: put the policy at a share of the way from where training began to
        where it ended, in merged weights."""
        self._check_joined()
        assert self.way is not None, "the configuration has no shares to interpolate"
        self.way.go(share)

    def stop(self) -> None:
        super().stop()
        self.way = None

    def loss(self, sequences: Sequences) -> float:
        """All ranks: mean negative log-likelihood, nats per completion token, of the current policy."""
        logprobs = self._engine().logprobs(self._trained_on(sequences))
        return float(-logprobs.astype(np.float64).mean())

    def _trained_on(self, sequences: Sequences) -> Sequences:
        return without_prompts(sequences) if self.finetune.full_sequence else sequences


class FinetunePool(TrainPool[FinetuneWorker]):
    """All fine-tune ranks."""

    def __init__(
        self, handles: Sequence[ActorHandle[FinetuneWorker]], *, timeout_s: float, restarts: int = 0
    ) -> None:
        super().__init__("fine-tune", handles, timeout_s=timeout_s, restarts=restarts)

    def start(self, policy: Path, model: ModelConfig, finetune: FinetuneConfig, seed: int) -> None:
        self.together = finetune.zero_stage == 3 and len(self.actors) > 1
        self.actors.call_all(FinetuneWorker.start, str(policy), model, finetune, seed)

    def update(self, sequences: Sequences, anchor: Anchor | None = None) -> FinetuneStats:
        near = put_once(anchor) if anchor else None
        return self.actors.call_all(FinetuneWorker.update, put_once(sequences), near)[0]

    def interpolate(self, share: float) -> None:
        self.actors.call_all(FinetuneWorker.interpolate, share)

    def loss(self, sequences: Sequences) -> float:
        return self.actors.call_all(FinetuneWorker.loss, put_once(sequences))[0]
