"""What a run will start and do, computed from the configuration alone. Pure; imports no ML library and not
Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from frpo.config import OWN_PROMPTS, Config, DownstreamRl, DownstreamSft, JudgeReward
from frpo.outline import Heldout, Stage, list_stages


def make_thread_env(count: int) -> dict[str, str]:
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
        new_index: dict[int, int] = {}  # of the bundles that are kept
        actors: list[Actor] = []
        for actor in self.actors:
            if actor.role in roles:
                bundles = [new_index.setdefault(bundle, len(new_index)) for bundle in actor.bundles]
                actors.append(replace(actor, bundles=tuple(bundles)))
        kept = tuple(self.bundles[bundle] for bundle in new_index)
        return replace(self, actors=tuple(actors), bundles=kept)

    @property
    def num_cpus(self) -> float:
        return sum(bundle.get("CPU", 0.0) for bundle in self.bundles)

    @property
    def num_gpus(self) -> float:
        return sum(bundle.get("GPU", 0.0) for bundle in self.bundles)


def plan_run(config: Config, heldout: Heldout | None = None) -> Plan:
    """Roles, placement and sizes; completions of measurements where the held-out prompts are counted."""
    roles = _list_roles(config)
    actors, bundles = (
        place_on_shared_cards(config, roles) if config.rollout.sleep else place_apart(config, roles)
    )
    stages = tuple(_plan_stage(config, stage, heldout) for stage in list_stages(config))
    drawn = sum(stage.trained + (stage.measured or 0) for stage in stages)
    return Plan(tuple(actors), tuple(bundles), stages, drawn * config.rollout.max_new_tokens)


def judges_of(config: Config) -> dict[str, JudgeReward]:
    """Judges by the name of their role: each has engines of its own."""
    return {f"judge {r.name}": r for r in config.rewards if isinstance(r, JudgeReward)}


def _list_roles(config: Config) -> list[Role]:
    """Those that do not train. The reference is left out when no loop has a penalty, or where the learner's
    ranks are the reference."""
    rollout, reward, evaluate, reference = config.rollout, config.reward, config.evaluate, config.reference
    roles: list[Role] = [
        ("rollout", rollout.num_workers, rollout.num_cpus, rollout.num_gpus * rollout.tensor_parallel),
        ("reward", reward.num_workers, reward.num_cpus, reward.num_gpus),
        ("evaluate", evaluate.num_workers, evaluate.num_cpus, evaluate.num_gpus),
    ]
    for role, judge in judges_of(config).items():
        roles.append((role, judge.num_workers, judge.num_cpus, judge.num_gpus))
    if config.harness:
        roles.append(("harness", 1, evaluate.num_cpus, 0.0))
    objectives = [arm.objective for arm in config.arms]
    objectives += [task.objective for task in config.downstream if isinstance(task, DownstreamRl)]
    asked_for = config.attack or any(objective.penalised for objective in objectives)
    if asked_for and reference.share is None:
        roles.append(("reference", reference.num_workers, reference.num_cpus, reference.num_gpus))
    return roles


TAKE_TURNS = ("rollout", "reference", "evaluate")
"""Roles besides those that train that can leave a GPU and come back to it."""

TRAINS = ("learner", "finetune")
"""Roles that train; the ranks of both stand on the same bundles, since they never train at once."""


def _list_trainers(config: Config) -> tuple[str, ...]:
    """Fine-tune ranks are left out where arms train and no stage trains on examples. What has no arms may be
    a run of an audit: those share a team, and some fine-tune."""
    trainings = [stage.training() for stage in list_stages(config)]
    on_examples = any(training and training.objective is None for training in trainings)
    return TRAINS if on_examples or not config.arms else ("learner",)


Role = tuple[str, int, float, float]
"""Name, number of workers, CPUs and GPUs of each."""
Bundle = dict[str, float]
"""Resources, as Ray names them."""


def place_apart(config: Config, roles: Sequence[Role]) -> tuple[list[Actor], list[Bundle]]:
    """A bundle for each actor, but a learner rank shares with the fine-tune rank of its number: they never
    train at once."""
    learner, trainers = config.learner, _list_trainers(config)
    ranks = tuple(range(learner.num_workers))
    bundles = [_bundle_of(learner.num_cpus, learner.num_gpus) for _ in ranks]
    cpus, gpus = learner.num_cpus / len(trainers), learner.num_gpus / len(trainers)
    actors = [Actor(role, learner.num_workers, cpus, gpus, ranks) for role in trainers]
    return actors + _place_alone(roles, bundles), bundles


def place_on_shared_cards(config: Config, roles: Sequence[Role]) -> tuple[list[Actor], list[Bundle]]:
    """A bundle for each card, with learner rank i, fine-tune rank i, engine i, and scorers i that ask for
    GPUs: they hold its memory in turn, whatever share they ask for. All others have bundles of their own."""
    learner, trainers = config.learner, _list_trainers(config)
    cards = tuple(range(learner.num_workers))
    cpus = learner.num_cpus / len(trainers)
    on_cards: list[Role] = [(role, learner.num_workers, cpus, learner.num_gpus) for role in trainers]
    others: list[Role] = []
    for role in roles:
        name, _, _, gpus = role
        if name in TAKE_TURNS and gpus > 0:
            on_cards.append(role)
        else:
            others.append(role)
    share = int(1e4 / len(on_cards)) / 1e4  # Ray counts in ten-thousandths
    actors = [Actor(role, count, cpus, share, cards[:count]) for role, count, cpus, _ in on_cards]
    bundles: list[Bundle] = []
    for card in cards:
        cpus = sum(actor.num_cpus for actor in actors if card in actor.bundles)
        bundles.append(_bundle_of(cpus, 1.0))
    return actors + _place_alone(others, bundles), bundles


def _place_alone(roles: Sequence[Role], bundles: list[Bundle]) -> list[Actor]:
    """Actors with a bundle each, added to `bundles`."""
    actors = []
    for role, count, cpus, gpus in roles:
        first = len(bundles)
        bundles += [_bundle_of(cpus, gpus) for _ in range(count)]
        actors.append(Actor(role, count, cpus, gpus, tuple(range(first, first + count))))
    return actors


def _bundle_of(cpus: float, gpus: float) -> Bundle:
    # Ray refuses an empty bundle: a role without any reservation still needs a place to stand
    if cpus <= 0 and gpus <= 0:
        return {"CPU": 0.001}
    return {name: value for name, value in (("CPU", cpus), ("GPU", gpus)) if value > 0}


def _plan_stage(config: Config, stage: Stage, heldout: Heldout | None) -> StagePlan:
    training = stage.training()
    updates = training.num_updates if training else 0
    steps = training.num_steps if training and training.objective else 0
    trained = steps * config.rollout.prompts_per_step * config.rollout.group_size
    if training and isinstance(training.settings, DownstreamSft) and training.settings.draws_own:
        trained += OWN_PROMPTS * config.rollout.group_size  # at most
    measured = stage.num_measured(config, heldout) if heldout else None
    return StagePlan(stage.name, updates, trained, measured)
