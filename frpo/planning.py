"""What a run will start and do, computed from the configuration alone. Pure; imports no ML library and not Ray."""

from __future__ import annotations

from dataclasses import dataclass, replace

from frpo.config import Config, DownstreamRl


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
    completions: int
    """Drawn, evaluations and validations included."""


@dataclass(frozen=True)
class Plan:
    actors: tuple[Actor, ...]
    bundles: tuple[dict[str, float], ...]
    """Resources of each placement bundle, as Ray names them."""
    stages: tuple[StagePlan, ...]
    max_tokens: int
    """Upper bound of completion tokens drawn in the run; held-out prompts unknown to the plan are not counted."""

    def only(self, *roles: str) -> Plan:
        """The same for some of the roles."""
        kept = [a for a in self.actors if a.role in roles]
        order = [b for a in kept for b in a.bundles]
        actors = tuple(replace(a, bundles=tuple(order.index(b) for b in a.bundles)) for a in kept)
        return replace(self, actors=actors, bundles=tuple(self.bundles[b] for b in order))

    @property
    def num_cpus(self) -> float:
        return sum(b.get("CPU", 0.0) for b in self.bundles)

    @property
    def num_gpus(self) -> float:
        return sum(b.get("GPU", 0.0) for b in self.bundles)


def plan(config: Config) -> Plan:
    """Roles, placement and sizes. A learner rank and the fine-tune rank of the same number share a bundle: they never
    train at once. The reference is left out when no loop has a penalty."""
    rollout = config.rollout
    roles = [
        ("rollout", rollout.num_workers, rollout.num_cpus, rollout.num_gpus * rollout.tensor_parallel),
        ("reward", config.reward.num_workers, config.reward.num_cpus, config.reward.num_gpus),
        ("evaluate", config.evaluate.num_workers, config.evaluate.num_cpus, config.evaluate.num_gpus),
    ]
    if config.harness:
        roles.append(("harness", 1, config.evaluate.num_cpus, 0.0))
    objectives = [a.objective for a in config.arms] + [d.objective for d in config.downstream if isinstance(d, DownstreamRl)]
    if config.attack or any(o.penalised for o in objectives):
        reference = config.reference
        roles.append(("reference", reference.num_workers, reference.num_cpus, reference.num_gpus))
    actors: list[Actor] = []
    bundles: list[dict[str, float]] = []
    learner = config.learner
    ranks = tuple(range(learner.num_workers))
    for _ in ranks:
        bundles.append(_bundle(learner.num_cpus, learner.num_gpus))
    for role in ("learner", "finetune"):
        actors.append(Actor(role, learner.num_workers, learner.num_cpus / 2, learner.num_gpus / 2, ranks))
    for role, count, cpus, gpus in roles:
        first = len(bundles)
        bundles += [_bundle(cpus, gpus) for _ in range(count)]
        actors.append(Actor(role, count, cpus, gpus, tuple(range(first, first + count))))
    return Plan(tuple(actors), tuple(bundles), _stages(config), _max_tokens(config))


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    # Ray refuses an empty bundle: a role without any reservation still needs a place to stand
    found = {k: v for k, v in (("CPU", cpus), ("GPU", gpus)) if v > 0}
    return found or {"CPU": 0.001}


def _stages(config: Config) -> tuple[StagePlan, ...]:
    stages = [StagePlan("base", config.base.num_steps if config.base else 0, 0)]
    per_step = config.rollout.prompts_per_step * config.rollout.group_size
    for arm in config.arms:
        stages.append(
            StagePlan(f"rlhf/{arm.name}", arm.learner.num_steps * arm.learner.updates_per_batch, arm.learner.num_steps * per_step)
        )
        for d in config.downstream:
            drawn = d.num_steps * per_step if isinstance(d, DownstreamRl) else 0
            stages.append(StagePlan(f"downstream/{arm.name}/{d.name}", d.num_steps, drawn))
        if attack := config.attack:
            stages += [StagePlan(f"attack/{arm.name}/{r:g}", attack.num_steps, attack.num_steps * per_step) for r in attack.radii]
    return tuple(stages)


def _max_tokens(config: Config) -> int:
    return sum(s.completions for s in _stages(config)) * config.rollout.max_new_tokens
