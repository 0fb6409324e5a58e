"""What a run will start and do, computed from the configuration alone. Pure; imports no ML library and not
Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from frpo.config import Config, DownstreamRl
from frpo.outline import Heldout, Stage, outline


def threads(count: int) -> dict[str, str]:
    """Environment of actors that share cores."""
    return {"OMP_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Actor:
    """The workers of one role."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float
    bundles: tuple[int, ...]
    """Placement bundle of each worker."""


@dataclass(frozen=True)
class StagePlan:
    """Size of one stage."""

    name: str
    updates: int
    """Optimiser updates."""
    trained: int
    """Completions drawn to train on."""
    measured: int | None
    """Completions drawn to measure: evaluations, validations, the certificate. None where their number is not
    known: benchmarks, and all of them while the held-out prompts are not counted."""


@dataclass(frozen=True)
class Plan:
    actors: tuple[Actor, ...]
    bundles: tuple[dict[str, float], ...]
    """Resources of each placement bundle, as Ray names them."""
    stages: tuple[StagePlan, ...]
    max_tokens: int
    """Upper bound of completion tokens drawn in the run; what is measured by an unknown number of completions
    is not counted."""

    def only(self, *roles: str) -> Plan:
        """The same for some of the roles."""
        kept = [a for a in self.actors if a.role in roles]
        order = list(dict.fromkeys(b for a in kept for b in a.bundles))
        actors = tuple(replace(a, bundles=tuple(order.index(b) for b in a.bundles)) for a in kept)
        return replace(self, actors=actors, bundles=tuple(self.bundles[b] for b in order))

    @property
    def num_cpus(self) -> float:
        return sum(b.get("CPU", 0.0) for b in self.bundles)

    @property
    def num_gpus(self) -> float:
        return sum(b.get("GPU", 0.0) for b in self.bundles)


def plan(config: Config, heldout: Heldout | None = None) -> Plan:
    """Roles, placement and sizes; completions of measurements where the held-out prompts are counted.

    The reference is left out when no loop has a penalty, or where the learner's ranks are the reference.
    """
    rollout = config.rollout
    roles: list[Role] = [
        ("rollout", rollout.num_workers, rollout.num_cpus, rollout.num_gpus * rollout.tensor_parallel),
        ("reward", config.reward.num_workers, config.reward.num_cpus, config.reward.num_gpus),
        ("evaluate", config.evaluate.num_workers, config.evaluate.num_cpus, config.evaluate.num_gpus),
    ]
    if config.harness:
        roles.append(("harness", 1, config.evaluate.num_cpus, 0.0))
    objectives = [a.objective for a in config.arms] + [
        d.objective for d in config.downstream if isinstance(d, DownstreamRl)
    ]
    reference = config.reference
    if reference.share is None and (config.attack or any(o.penalised for o in objectives)):
        roles.append(("reference", reference.num_workers, reference.num_cpus, reference.num_gpus))
    actors, bundles = shared(config, roles) if rollout.sleep else apart(config, roles)
    stages = tuple(_size(config, stage, heldout) for stage in outline(config))
    drawn = sum(s.trained + (s.measured or 0) for s in stages)
    return Plan(tuple(actors), tuple(bundles), stages, drawn * config.rollout.max_new_tokens)


TAKE_TURNS = ("rollout", "reference", "evaluate")
"""Roles besides those that train that can leave a GPU and come back to it."""

Role = tuple[str, int, float, float]
"""Name, number of workers, CPUs and GPUs of each."""


def apart(config: Config, roles: Sequence[Role]) -> tuple[list[Actor], list[dict[str, float]]]:
    """A bundle for each actor, but a learner rank shares with the fine-tune rank of its number: they never
    train at once."""
    learner = config.learner
    ranks = tuple(range(learner.num_workers))
    bundles = [_bundle(learner.num_cpus, learner.num_gpus) for _ in ranks]
    actors = [
        Actor(role, learner.num_workers, learner.num_cpus / 2, learner.num_gpus / 2, ranks)
        for role in ("learner", "finetune")
    ]
    return actors + _alone(roles, bundles), bundles


def shared(config: Config, roles: Sequence[Role]) -> tuple[list[Actor], list[dict[str, float]]]:
    """A bundle for each card, with learner rank i, fine-tune rank i, engine i, and scorers i that ask for
    GPUs: they hold its memory in turn, whatever share they ask for. All others have bundles of their own."""
    learner = config.learner
    training: list[Role] = [
        (r, learner.num_workers, learner.num_cpus / 2, learner.num_gpus) for r in ("learner", "finetune")
    ]
    turns = [role for role in roles if role[0] in TAKE_TURNS and role[3] > 0]
    cards = tuple(range(learner.num_workers))
    share = int(1e4 / len(training + turns)) / 1e4  # Ray counts in ten-thousandths
    actors = [Actor(role, count, cpus, share, cards[:count]) for role, count, cpus, _ in training + turns]
    bundles = [_bundle(sum(a.num_cpus for a in actors if card in a.bundles), 1.0) for card in cards]
    return actors + _alone([role for role in roles if role not in turns], bundles), bundles


def _alone(roles: Sequence[Role], bundles: list[dict[str, float]]) -> list[Actor]:
    """Actors with a bundle each, added to `bundles`."""
    actors = []
    for role, count, cpus, gpus in roles:
        first = len(bundles)
        bundles += [_bundle(cpus, gpus) for _ in range(count)]
        actors.append(Actor(role, count, cpus, gpus, tuple(range(first, first + count))))
    return actors


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    # Ray refuses an empty bundle: a role without any reservation still needs a place to stand
    found = {k: v for k, v in (("CPU", cpus), ("GPU", gpus)) if v > 0}
    return found or {"CPU": 0.001}


def _size(config: Config, stage: Stage, heldout: Heldout | None) -> StagePlan:
    training = stage.training()
    updates = training.num_updates if training else 0
    steps = training.num_steps if training and training.objective else 0
    trained = steps * config.rollout.prompts_per_step * config.rollout.group_size
    measured = stage.num_measured(config, heldout) if heldout else None
    return StagePlan(stage.name, updates, trained, measured)
