"""Learners: DeepSpeed ranks that turn a batch with advantages into optimiser updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ray.actor import ActorHandle

from frpo.actors._blocks import Logprobs
from frpo.actors._calls import put_once
from frpo.actors._gather import Dealt, Gathered
from frpo.actors._train import OfRank0, TrainPool, TrainWorker
from frpo.config import LearnerConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from frpo.roles import Pending, Running
from frpo.stats import UpdateStats
from frpo.types import Floats, Group, RolloutBatch

if TYPE_CHECKING:
    from torch import Tensor

    from frpo.objective import Surrogate
    from frpo.packing import Pack, Rows


@dataclass(frozen=True)
class Sums:
    """Sums over completion tokens; first of a micro-batch, then of all of one step, then of all ranks."""

    loss: float = 0.0
    penalty: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    capped: float = 0.0
    mismatch: float = 0.0
    """Of the tokens of fresh completions (`RolloutBatch.fresh`)."""
    stale: float = 0.0
    """The same of all others."""
    divergence: float = 0.0
    tokens: float = 0.0
    """Completion tokens."""
    fresh: float = 0.0
    """Of them, those of fresh completions."""
    computed: float = 0.0
    """Tokens, prompts included, each as often as it was computed."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(own + more for own, more in zip(astuple(self), astuple(other), strict=True)))


class LearnerWorker(TrainWorker):
    """One rank of the learner."""

    def start(
        self,
        policy: str,
        model: ModelConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        rollout: RolloutConfig,
        seed: int,
    ) -> None:
        """All ranks: a fresh optimiser on a saved policy; an engine left from before is freed."""
        from frpo.actors._engine import Engine

        self._check_joined()
        self.stop()
        self.learner, self.objective, self.rollout = learner, objective, rollout
        self.engine = Engine(
            Path(policy), model, learner, learner.num_steps * learner.updates_per_batch, seed, dropout=False
        )

    def update(self, batch: RolloutBatch) -> UpdateStats:
        """All ranks: one step. The batch is cut, in its order, into `updates_per_batch` parts of one
        optimiser update each; with one part the ratio is exactly 1 and the learner's own log-probs are the
        old ones. Several want `batch.old`."""
        began = time.perf_counter()
        engine = self._engine()
        mine = Sums()
        parts = np.array_split(np.arange(len(batch.sequences)), self.learner.updates_per_batch)
        assert batch.old is not None or not self.learner.wants_old
        for rows in parts:
            if len(rows):
                result, told = engine.step(engine.share(batch.sequences, rows), self._loss(batch, rows))
                mine = sum(told, mine)
        sums = Sums(*engine.reduce(astuple(mine)))
        return UpdateStats(
            loss=sums.loss / len(parts),
            penalty=sums.penalty / sums.tokens,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            entropy=sums.entropy / sums.tokens,
            clip_share=sums.clipped / sums.tokens,
            capped_share=sums.capped / sums.tokens,
            mismatch_kl=sums.mismatch / sums.fresh if sums.fresh else None,
            stale_kl=sums.stale / (sums.tokens - sums.fresh) if sums.tokens > sums.fresh else None,
            kl=None if batch.reference is None else sums.divergence / len(batch.sequences),
            num_computed_tokens=int(sums.computed),
            learner_s=time.perf_counter() - began,
        )

    def _loss(self, batch: RolloutBatch, part: Rows) -> Callable[[list[Pack]], tuple[Tensor, Sums]]:
        """The loss of one update as a function of packs, with the denominators of the whole part; and what is
        counted on the way."""
        import torch

        from frpo.objective import Denominators, TokenTerms, Weights, policy_loss
        from frpo.packing import pack_lengths, pad_packs, pad_values

        engine, o, sequences = self._engine(), self.objective, batch.sequences
        several = self.learner.wants_old
        denominators = Denominators(
            num_completions=len(part),
            num_tokens=int((sequences.lengths - sequences.prompt_lengths)[part].sum()),
            max_tokens=self.rollout.max_new_tokens,
        )
        surrogate = make_surrogate(o)

        def loss(packs: list[Pack]) -> tuple[Tensor, Sums]:
            now = engine.forward(pad_packs(sequences, packs, engine.device), self.rollout.temperature)
            rows = np.concatenate(packs)

            def values(flat: Floats) -> Tensor:
                return pad_values(flat, sequences, rows, now.mask.shape[1]).to(engine.device)

            own = now.logprobs.detach()
            old = own if batch.old is None else values(batch.old)
            before = old if several else own
            behaviour = values(batch.behaviour)
            reference = None if batch.reference is None else values(batch.reference)
            advantages, betas = (
                torch.from_numpy(of[rows]).to(engine.device) for of in (batch.advantages, batch.betas)
            )
            terms = policy_loss(
                TokenTerms(now.logprobs, before, behaviour, reference, now.mask),
                Weights(advantages, betas),
                surrogate,
                denominators,
            )
            gap = ((behaviour - before) * now.mask).double()
            # k3 of KL(engine || learner), drawn from the engine
            mismatch = torch.exp(-gap) - 1 + gap
            fresh = now.mask & torch.from_numpy(batch.fresh[rows])[:, None].to(engine.device)
            divergence = 0.0
            if reference is not None:
                divergence = float(((old - reference) * now.mask).double().sum())
            return terms.loss, Sums(
                loss=float(terms.loss.detach()),
                penalty=float(terms.penalty_sum),
                entropy=float(now.entropy.sum()),
                clipped=float(terms.clipped),
                capped=float(terms.capped),
                mismatch=float(mismatch[fresh].sum()),
                stale=float(mismatch[now.mask & ~fresh].sum()),
                divergence=divergence,
                tokens=float(now.mask.sum()),
                fresh=float(fresh.sum()),
                computed=float(pack_lengths(sequences, packs).sum()),
            )

        return loss


def make_surrogate(objective: ObjectiveConfig) -> Surrogate:
    from frpo.objective import Surrogate

    return Surrogate(
        ratio=objective.ratio,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        importance=objective.importance,
        importance_cap=objective.importance_cap,
        aggregation=objective.aggregation,
        penalty=objective.penalty,
    )


class LearnerPool(TrainPool[LearnerWorker]):
    """All learner ranks; implements roles.Learner."""

    def __init__(
        self, handles: Sequence[ActorHandle[LearnerWorker]], *, timeout_s: float, restarts: int = 0
    ) -> None:
        super().__init__("learner", handles, timeout_s=timeout_s, restarts=restarts)
        self.takes_turns = False
        self.policy = Path()
        self.temperature = 1.0
        self.scores = LearnerScores(self, start=False)
        self.beginning = LearnerScores(self, start=True)

    def start(
        self,
        policy: Path,
        model: ModelConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        rollout: RolloutConfig,
        seed: int,
    ) -> None:
        self.together = learner.zero_stage == 3 and len(self.actors) > 1
        self.policy, self.temperature = policy, rollout.temperature
        self.actors.call_all(LearnerWorker.start, str(policy), model, learner, objective, rollout, seed)

    def score(self, group: Group) -> Pending[Logprobs]:
        return self.scores.score(group)

    def update(self, batch: RolloutBatch) -> Running[UpdateStats]:
        return OfRank0(self.actors.submit_all(LearnerWorker.update, put_once(batch)))


class LearnerScores:
    """Log-probs of groups by the learner's ranks, each alone in a block: of the policy in training, or of the
    one that it began from (reference.share). Implements roles.Reference."""

    def __init__(self, pool: LearnerPool, *, start: bool) -> None:
        self.pool, self.start = pool, start
        self.gathered = Gathered(self._ask)

    def use(self, policy: Path, temperature: float) -> None:
        """As a reference, it is the policy that the learner was started from, which must be this one."""
        assert (policy, temperature) == (self.pool.policy, self.pool.temperature), (
            f"the learner began from {self.pool.policy}"
        )

    def score(self, group: Group) -> Pending[Logprobs]:
        """At once by one rank, beside the generation; when all is drawn where a rank cannot compute alone, or
        shares a card."""
        later = self.gathered.later(group)
        if not (self.pool.together or self.pool.takes_turns):
            self.gathered.ask_all()
        return later

    def _ask(self, groups: list[Group]) -> Dealt:
        blocks = [[group] for group in groups]
        return self.pool.ask(blocks, self.pool.temperature, start=self.start, first=groups[0].index)
