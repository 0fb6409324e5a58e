"""Partners of the driver without Ray, engines or models: a softmax policy over six one-token answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frpo.config import Config, ObjectiveConfig
from frpo.objective import Denominators, Surrogate, TokenTerms, Weights, kl_from_start, policy_loss
from frpo.records import BenchmarkScore
from frpo.roles import Running, Team
from frpo.stats import FinetuneStats, UpdateStats
from frpo.types import (
    Anchor,
    Arrival,
    Arrivals,
    Completion,
    Floats,
    Group,
    Prompt,
    Reward,
    RolloutBatch,
    Sampling,
    Sequences,
    Ticket,
)

ANSWERS = 6


class Now:
    """A Pending that is ready."""

    def __init__(self, value):  # type: ignore[no-untyped-def]
        self.value = value

    def ready(self) -> bool:
        return True

    def result(self, limit_s=None):  # type: ignore[no-untyped-def]
        return self.value

    def on_ready(self, call: Callable[[], None]) -> None:
        call()


class FakePrompts:
    def __init__(self, count: int) -> None:
        self.count, self.taken, self.places = count, list[int](), list[int]()

    def take(self, step: int) -> tuple[Prompt, ...]:
        self.taken.append(step)
        return tuple(map(self._prompt, range(step * self.count, (step + 1) * self.count)))

    def at(self, place: int) -> Prompt:
        self.places.append(place)
        return self._prompt(place)

    def _prompt(self, place: int) -> Prompt:
        step, index = divmod(place, self.count)
        return Prompt(f"p:{step}:{index}", "?", np.array([9, index], np.int32), "only", {})


class FakeEngine:
    """Holds the logits it was last given, and arrives with its groups in reverse order."""

    def __init__(self) -> None:
        self.logits, self.version = torch.zeros(ANSWERS), -1
        self.drawings: list[FakeSession] = []

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
    ) -> Iterator[Group]:
        assert policy_version == self.version
        logp = torch.log_softmax(self.logits, 0)
        for index in reversed(range(len(prompts))):
            draw = torch.Generator().manual_seed(seeds[index])
            tokens = torch.multinomial(logp.exp(), sampling.num_completions, True, generator=draw)
            yield Group(index, prompts[index], tuple(self.completion(int(t), logp) for t in tokens))

    def completion(self, token: int, logp: torch.Tensor) -> Completion:
        logprobs, versions = logp[token : token + 1].numpy().copy(), np.array([self.version], np.int32)
        return Completion(np.array([token], np.int32), logprobs, versions, f"answer {token}", "stop")

    def open(self, sampling: Sampling) -> FakeSession:
        return FakeSession(self, sampling)

    def logprobs(self, sequences: Sequences) -> Floats:
        return completion_logprobs(self.logits, sequences)[None]  # of one engine

    def load_policy(self, folder: Path, version: int) -> None:
        self.logits, self.version = saved_logits(folder), version

    def take_turn(self) -> None: ...


class FakeSession:
    """Draws what was begun in an order of its own, by the weights that the engine has then; each wait brings
    one group, and those in `dies` come the second time alone."""

    def __init__(self, engine: FakeEngine, sampling: Sampling, room: int = 10) -> None:
        self.engine, self.sampling, self.places = engine, sampling, room
        self.drawing: dict[int, tuple[Ticket, float]] = {}
        self.begun: list[int] = []
        self.seeds: dict[int, set[int]] = {}
        self.dies: set[int] = set()
        self.closed = False
        engine.drawings.append(self)

    @property
    def room(self) -> int:
        return self.places - len(self.drawing)

    def begin(self, ticket: Ticket, policy_version: int) -> None:
        assert policy_version == self.engine.version
        assert self.room > 0
        self.drawing[ticket.number] = ticket, time.perf_counter()
        self.begun.append(ticket.number)
        self.seeds.setdefault(ticket.number, set()).add(ticket.seed)

    def wait(self, until: Running[object] | None = None) -> Arrivals:
        if not self.drawing:
            assert until is not None, "nobody could unblock this"
            return Arrivals()
        number = max(self.drawing, key=lambda n: (n * 7 + 3) % 11)
        ticket, began = self.drawing.pop(number)
        if number in self.dies:
            self.dies.remove(number)
            return Arrivals(lost=(number,))
        (group,) = self.engine.generate([ticket.prompt], [ticket.seed], self.sampling, self.engine.version)
        return Arrivals((Arrival(replace(group, index=number), began, time.perf_counter()),))

    def close(self) -> None:
        self.closed = True


def saved_logits(policy: Path) -> torch.Tensor:
    """Of an exported policy; the base, which is no file, is uniform."""
    file = policy / "logits.npy"
    return torch.from_numpy(np.load(file)) if file.exists() else torch.zeros(ANSWERS)


def answers_of(sequences: Sequences) -> torch.Tensor:
    """The last token of each."""
    return torch.from_numpy(sequences.tokens[np.cumsum(sequences.lengths) - 1].astype(np.int64))


def completion_logprobs(logits: torch.Tensor, sequences: Sequences) -> Floats:
    result: Floats = torch.log_softmax(logits.detach(), 0)[answers_of(sequences)].numpy()
    return result


class FakeRewards:
    def __init__(self, table: Sequence[float | None], reasons: str = "no judge") -> None:
        self.table, self.reason = table, reasons

    def score(self, group: Group) -> Now:
        values = [self.table[int(c.token_ids[0])] for c in group.completions]
        return Now(tuple(Reward(v, {"table": v}, None if v is not None else self.reason) for v in values))


class FakeReference:
    def use(self, policy: Path, temperature: float) -> None: ...

    def score(self, group: Group) -> Now:
        return Now(tuple(np.full(1, -np.log(ANSWERS), np.float32) for _ in group.completions))


class FakeLearner:
    """Plain gradient descent on the real loss."""

    def __init__(self, objective: ObjectiveConfig, learning_rate: float = 2.0) -> None:
        self.objective, self.learning_rate = objective, learning_rate
        self.logits = torch.zeros(ANSWERS, requires_grad=True)
        self.revived = 0
        self.seen: list[RolloutBatch] = []
        self.scored: list[int] = []

    def update(self, batch: RolloutBatch) -> Now:
        return Now(self.learn(batch))

    def learn(self, batch: RolloutBatch) -> UpdateStats:
        self.seen.append(batch)
        tokens = torch.from_numpy(
            batch.sequences.tokens.reshape(len(batch.sequences), -1)[:, -1].astype(np.int64)
        )
        logprobs = torch.log_softmax(self.logits, 0)[tokens][:, None]
        o = self.objective
        behaviour = torch.from_numpy(batch.behaviour)[:, None]
        reference = None
        if batch.reference is not None:
            reference = torch.from_numpy(batch.reference)[:, None]
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        terms = policy_loss(
            TokenTerms(logprobs, logprobs.detach(), behaviour, reference, mask),
            Weights(torch.from_numpy(batch.advantages), torch.from_numpy(batch.betas)),
            Surrogate(
                o.ratio,
                o.clip_low,
                o.clip_high,
                o.importance,
                o.importance_cap,
                o.aggregation,
                o.penalty,
            ),
            Denominators(num_completions=len(tokens), num_tokens=len(tokens), max_tokens=1),
        )
        (gradient,) = torch.autograd.grad(terms.loss, self.logits)
        gap = torch.from_numpy(batch.behaviour) - logprobs.detach()[:, 0]
        mismatch = gap.exp() - gap - 1
        fresh = torch.from_numpy(batch.fresh)
        with torch.no_grad():
            self.logits -= self.learning_rate * gradient
        divergence = (
            None if batch.reference is None else float(logprobs.detach().sum()) - float(batch.reference.sum())
        )
        return UpdateStats(
            loss=float(terms.loss.detach()),
            penalty=0.0,
            grad_norm=float(gradient.norm()),
            learning_rate=self.learning_rate,
            entropy=0.0,
            clip_share=0.0,
            capped_share=float(terms.capped) / len(tokens),
            mismatch_kl=float(mismatch[fresh].mean()) if fresh.any() else None,
            stale_kl=float(mismatch[~fresh].mean()) if not fresh.all() else None,
            kl=divergence and divergence / len(tokens),
            num_computed_tokens=len(tokens),
            learner_s=0.0,
        )

    def score(self, group: Group) -> Now:
        self.scored.append(group.index)
        return Now(self.submit([group]).value[0])

    def submit(self, groups: Sequence[Group]) -> Now:
        logp = torch.log_softmax(self.logits.detach(), 0)
        return Now(
            [
                tuple(logp[torch.from_numpy(c.token_ids.astype(np.int64))].numpy() for c in g.completions)
                for g in groups
            ]
        )

    def logprobs(self, sequences: Sequences) -> Floats:
        return completion_logprobs(self.logits, sequences)

    def save(self, folder: Path) -> Now:
        folder.mkdir(parents=True)
        np.save(folder / "logits.npy", self.logits.detach().numpy())
        return Now([])

    def load(self, folder: Path) -> None:
        self.logits = torch.from_numpy(np.load(folder / "logits.npy")).requires_grad_()

    def export(self, folder: Path, *, merged: bool = False) -> None:
        self.save(folder)

    def start(self, policy: Path, *settings: object) -> None:
        self.logits = saved_logits(policy).requires_grad_()

    def stop(self) -> None: ...

    def revive(self) -> None:
        self.revived += 1
        self.logits = torch.zeros(ANSWERS, requires_grad=True)


class FakeScorer:
    """Of saved policies."""

    def submit(self, policy: Path, groups: Sequence[Group]) -> Now:
        logp = torch.log_softmax(saved_logits(policy), 0)
        return Now(
            [
                tuple(logp[torch.from_numpy(c.token_ids.astype(np.int64))].numpy() for c in g.completions)
                for g in groups
            ]
        )


class FakeFinetuner(FakeLearner):
    """Descends the loss of examples whose completion is one answer."""

    settings: Any = None
    batches: list[tuple[Sequences, Anchor | None]]
    """Since it was made."""

    def start(self, policy: Path, *settings: object) -> None:
        super().start(policy)
        _, self.settings, *_ = (*settings, None, None)
        self.batches = getattr(self, "batches", [])
        self.ends = [self.logits.detach().clone()]

    def update(self, sequences: Sequences, anchor: Anchor | None = None) -> FinetuneStats:  # type: ignore[override]
        self.batches.append((sequences, anchor))
        loss = -self._of(sequences).mean()
        kl = None
        total = loss
        if anchor:
            kl = kl_from_start(self._of(anchor.sequences), torch.from_numpy(anchor.logprobs))
            kl = kl / len(anchor.sequences)
            total = loss + self.settings.kl_to_policy * kl
        (gradient,) = torch.autograd.grad(total, self.logits)
        with torch.no_grad():
            self.logits -= self.learning_rate * gradient
        return FinetuneStats(
            float(loss.detach()),
            float(gradient.norm()),
            self.learning_rate,
            len(sequences),
            0.1,
            None if kl is None else float(kl.detach()),
        )

    def interpolate(self, share: float) -> None:
        self.ends = [*self.ends, self.logits.detach().clone()][:2]
        self.logits = torch.lerp(*self.ends, share).requires_grad_()

    def loss(self, sequences: Sequences) -> float:
        return -float(self._of(sequences).mean().detach())

    def _of(self, sequences: Sequences) -> torch.Tensor:
        return torch.log_softmax(self.logits, 0)[answers_of(sequences)]


class FakeHarness:
    """Scores a policy by the share of its first answer."""

    def evaluate(self, policy: Path) -> tuple[BenchmarkScore, ...]:
        share = float(torch.softmax(saved_logits(policy), 0)[0])
        return (
            BenchmarkScore(task="first", metric="acc", filter="none", value=share, se=None, num_examples=1),
        )


class FakePublisher:
    def __init__(self, learner: FakeLearner, engine: FakeEngine, broken: bool = False) -> None:
        self.learner, self.engine, self.broken = learner, engine, broken

    def publish(self, policy_version: int) -> int:
        if not (self.broken and policy_version > 0):
            self.engine.logits = self.learner.logits.detach().clone()
        self.engine.version = policy_version
        return self.engine.logits.nbytes


def team(config: Config, table: Sequence[float | None]) -> Team:
    """Everybody whom a run of `config` works with."""
    engine = FakeEngine()
    learner, finetune = FakeLearner(config.objective), FakeFinetuner(config.objective)
    return Team(
        rollouts=engine,
        rewards=FakeRewards(table),
        reference=FakeReference(),
        learner=learner,
        finetune=finetune,
        scorer=FakeScorer(),
        harness=FakeHarness(),
        learner_publisher=FakePublisher(learner, engine),
        finetune_publisher=FakePublisher(finetune, engine),
    )


def config(**objective: object) -> Config:
    return Config.model_validate(
        {
            "name": "fake",
            "seed": 7,
            "model": {"path": "nowhere"},
            "data": {
                "train": [{"path": "nowhere.jsonl", "task": "only"}],
                "heldout": [{"path": "nowhere.jsonl", "task": "only"}],
            },
            "rewards": [{"kind": "function", "name": "table", "function": "nowhere:table"}],
            "rollout": {"prompts_per_step": 6, "group_size": 8, "max_new_tokens": 1, "parity_every": 4},
            "objective": {"aggregation": "sum", "penalty": "k3", **objective},
            "learner": {"num_steps": 30},
            "arms": [{"name": "arm"}],
        }
    )
