"""Fine-tune workers: supervised training of a saved policy on the learner's engine (base stage, downstream
tasks)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ray.actor import ActorHandle

from actors._calls import put_once
from actors._train import TrainPool, TrainWorker
from frpo.config import FinetuneConfig, ModelConfig
from frpo.stats import FinetuneStats
from frpo.types import Sequences

if TYPE_CHECKING:
    from torch import Tensor

    from frpo.packing import Pack


def without_prompts(sequences: Sequences) -> Sequences:
    """The same sequences with every token but the first as completion."""
    return Sequences(sequences.tokens, np.ones_like(sequences.prompt_lengths), sequences.lengths)


class FinetuneWorker(TrainWorker):
    """One rank."""

    def start(self, policy: str, model: ModelConfig, finetune: FinetuneConfig, seed: int) -> None:
        """All ranks: a fresh optimiser on a saved policy. With model.lora a fresh adapter is trained on
        it."""
        from actors._engine import Engine

        self._check_joined()
        self.stop()
        self.finetune = finetune
        self.engine = Engine(Path(policy), model, finetune, finetune.num_steps, seed, dropout=True)

    def update(self, sequences: Sequences) -> FinetuneStats:
        """All ranks: one optimiser update on the mean negative log-likelihood per completion token of the
        batch."""
        from frpo.packing import pad_packs

        began = time.perf_counter()
        engine = self._engine()
        sequences = self._trained_on(sequences)

        def loss(packs: list[Pack]) -> tuple[Tensor, float]:
            logprobs = engine.forward(pad_packs(sequences, packs, engine.device)).logprobs
            value = -logprobs.sum() / sequences.num_completion_tokens
            return value, float(value.detach())

        result, values = engine.step(engine.share(sequences), loss)
        total = 0.0
        for value in values:  # `sum` rounds otherwise from Python 3.12 on
            total += value
        (mean,) = engine.reduce([total])
        return FinetuneStats(
            mean,
            result.grad_norm,
            result.learning_rate,
            int(sequences.lengths.sum()),
            time.perf_counter() - began,
        )

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

    def update(self, sequences: Sequences) -> FinetuneStats:
        return self.actors.call_all(FinetuneWorker.update, put_once(sequences))[0]

    def loss(self, sequences: Sequences) -> float:
        return self.actors.call_all(FinetuneWorker.loss, put_once(sequences))[0]
