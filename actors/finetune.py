"""Fine-tune workers: supervised training of a saved policy on the learner's engine (base stage, downstream
tasks)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ray.actor import ActorHandle

from actors._calls import put_once
from actors._train import TrainPool, TrainWorker
from frpo.config import FinetuneConfig, ModelConfig
from frpo.types import FinetuneStats, Sequences


def whole(sequences: Sequences) -> Sequences:
    """The same sequences with every token but the first as completion."""
    return Sequences(sequences.tokens, np.ones_like(sequences.prompt_lengths), sequences.lengths)


class FinetuneWorker(TrainWorker):
    """One rank."""

    def start(self, policy: str, model: ModelConfig, finetune: FinetuneConfig, seed: int) -> None:
        """All ranks: a fresh optimiser on a saved policy. With model.lora a fresh adapter is trained on
        it."""
        from actors._engine import Engine

        self.stop()
        self.finetune = finetune
        self.engine = Engine(Path(policy), model, finetune, finetune.num_steps, seed, dropout=True)

    def update(self, sequences: Sequences) -> FinetuneStats:
        """All ranks: one optimiser update on the mean negative log-likelihood per completion token of the
        batch."""
        import torch

        from frpo.packing import Pack, pad

        began = time.perf_counter()
        engine = self._engine()
        if self.finetune.full_sequence:
            sequences = whole(sequences)
        total = 0.0

        def loss(packs: list[Pack], weight: float) -> torch.Tensor:
            nonlocal total
            value = (
                -engine.forward(pad(sequences, packs, engine.device)).logprobs.sum()
                / sequences.num_completion_tokens
            )
            total += float(value.detach()) * weight
            return value

        result = engine.step(engine.share(sequences), loss)
        (mean,) = engine.reduce([total])
        tokens = int(sequences.lengths.sum())
        return FinetuneStats(
            mean, result.grad_norm, result.learning_rate, tokens, time.perf_counter() - began
        )

    def loss(self, sequences: Sequences) -> float:
        """All ranks: mean negative log-likelihood, nats per completion token, of the current policy."""
        if self.finetune.full_sequence:
            sequences = whole(sequences)
        return float(-self._engine().logprobs(sequences).astype(np.float64).mean())


class FinetunePool(TrainPool[FinetuneWorker]):
    """All fine-tune ranks."""

    def __init__(self, handles: Sequence[ActorHandle[FinetuneWorker]], *, timeout_s: float) -> None:
        super().__init__("fine-tune", handles, timeout_s=timeout_s)

    def start(self, policy: Path, model: ModelConfig, finetune: FinetuneConfig, seed: int) -> None:
        self.together = finetune.zero_stage == 3 and len(self.actors) > 1
        self.actors.call_all(FinetuneWorker.start, str(policy), model, finetune, seed)

    def update(self, sequences: Sequences) -> FinetuneStats:
        return self.actors.call_all(FinetuneWorker.update, put_once(sequences))[0]

    def loss(self, sequences: Sequences) -> float:
        return self.actors.call_all(FinetuneWorker.loss, put_once(sequences))[0]
