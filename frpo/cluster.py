"""Places the actors of a run on Ray and hands out their pools. The only place where classes become actors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypedDict

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from frpo.actors._calls import Actors, Turns
from frpo.actors._publish import GroupPublisher, ParcelPublisher
from frpo.actors._vllm import judge_environment, vllm_environment
from frpo.actors.evaluate import EvaluatePool, EvaluateWorker
from frpo.actors.finetune import FinetunePool, FinetuneWorker
from frpo.actors.harness import HarnessPool, HarnessWorker
from frpo.actors.judge import JudgePool, JudgeWorker
from frpo.actors.learner import LearnerPool, LearnerWorker
from frpo.actors.reference import ReferencePool, ReferenceWorker
from frpo.actors.reward import RewardPool, RewardWorker, check_services_run
from frpo.actors.rollout import RolloutPool, RolloutWorker
from frpo.actors.transport import transport_of
from frpo.actors.transport.group import GroupTransport
from frpo.config import Config, ConfigError
from frpo.joining import join
from frpo.metrics import RunLog
from frpo.model_checks import weight_bytes
from frpo.planning import Actor, Plan, judges_of, make_thread_env, plan_run
from frpo.rewards.template import load_template
from frpo.roles import Publisher, Team, WorkerFailed
from frpo.secrets import secrets_of

remote: Any = ray.remote
Handle = ActorHandle[Any]


class Limits(TypedDict):
    timeout_s: float
    restarts: int


@contextmanager
def start_team(config: Config, log: RunLog) -> Iterator[Team]:
    """Connect to Ray (or start it here), place all actors, wait until each answers; take everything down at
    the end.

    Raises ConfigError when the cluster lacks what the plan needs, WorkerFailed when an actor does not start.
    """
    with place_actors(config, plan_run(config), log) as spawner:
        with log.waiting(f"starting {spawner.num_actors} actors (vLLM takes about half a minute)"):
            team = spawn(config, spawner)
        yield team


@contextmanager
def start_sampling(config: Config, log: RunLog) -> Iterator[tuple[RolloutPool, RewardPool, EvaluatePool]]:
    """As `start_team`, but only what draws and measures: engines, rewards and judges, evaluation workers."""
    asked = plan_run(config).only("rollout", "reward", "evaluate", *judges_of(config))
    with place_actors(config, asked, log) as spawner:
        with log.waiting("starting vLLM (about half a minute)"):
            pools = spawner.rollouts(), spawner.rewards(), spawner.scorer()
            groups: list[Actors[Any]] = [pools[0].actors, pools[1].actors, pools[2].actors]
            groups += [judge.actors for judge in pools[1].judges]
            for actors in groups:
                actors.wait_until_ready(config.cluster.start_timeout_s)
        if config.rollout.sleep:
            take_turns(spawner.asked, {"rollout": pools[0], "evaluate": pools[2]})
        yield pools


@contextmanager
def place_actors(config: Config, asked: Plan, log: RunLog) -> Iterator[Spawner]:
    with log.waiting("starting Ray"):
        join(config.cluster.address, object_store_bytes(config))
    try:
        refuse_if_too_small(asked)
        check_services_run(config.rewards)
        with log.waiting("placing the actors"):
            group = place_bundles(config, asked)
        try:
            yield Spawner(config, asked, group)
        finally:
            remove_placement_group(group)
    finally:
        ray.shutdown()


def object_store_bytes(config: Config, teams: int = 1) -> int:
    """One version of each team's weights lies there at a time; a store that is too small spills it to disk at
    each publish."""
    if config.cluster.object_store_gib is not None:
        return int(config.cluster.object_store_gib * 2**30)
    return teams * (2**29 + weight_bytes(config.model))


def refuse_if_too_small(asked: Plan) -> None:
    """Compare the plan with the cluster's total before anything waits for a placement that can't be had."""
    total = ray.cluster_resources()
    for resource, need, remedy in (
        ("CPU", asked.num_cpus, "lower num_cpus or num_workers of an actor"),
        ("GPU", asked.num_gpus, "lower num_gpus or num_workers of an actor"),
    ):
        have = total.get(resource, 0.0)
        if need > have + 1e-6:
            raise ConfigError(
                f"cluster: the plan needs {need:g} {resource}s and the cluster has {have:g}; {remedy}, or "
                "add nodes"
            )


@contextmanager
def share_cluster(config: Config, most: int) -> Iterator[str]:
    """One Ray for several processes, each with a team of its own, at most `most`: gives the address to
    join."""
    teams = min(most, max(1, int((os.cpu_count() or 1) / plan_run(config).num_cpus)))
    join(config.cluster.address, object_store_bytes(config, teams))
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


def teams_that_fit(asked: Plan) -> int:
    """How many teams the free part of the cluster holds at once; at least 1, the placement says what is
    lacking."""
    free = ray.available_resources()
    needs = (("CPU", asked.num_cpus), ("GPU", asked.num_gpus))
    return max(1, min(int(free.get(name, 0.0) / need + 1e-6) for name, need in needs if need > 0))


def place_bundles(config: Config, asked: Plan) -> PlacementGroup:
    group = placement_group([dict(b) for b in asked.bundles], strategy=config.cluster.strategy)
    if not group.wait(timeout_seconds=config.cluster.start_timeout_s):
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        remove_placement_group(group)
        raise WorkerFailed(
            f"No placement for {len(asked.bundles)} bundles ({asked.num_cpus:g} CPUs, {asked.num_gpus:g} "
            "GPUs) within "
            f"{config.cluster.start_timeout_s:g} s; free now: {free}. Wait for other jobs or lower the plan."
        )
    return group


class Spawner:
    """Starts the actors of a plan in their placement group, a pool a role. Returns at once: they start side
    by side."""

    def __init__(self, config: Config, asked: Plan, group: PlacementGroup) -> None:
        self.config, self.asked, self.group = config, asked, group
        cluster = config.cluster
        self.limits: Limits = {"timeout_s": cluster.call_timeout_s, "restarts": cluster.max_restarts}

    @property
    def num_actors(self) -> int:
        return sum(a.count for a in self.asked.actors)

    def workers(
        self, role: str, cls: type, arguments: Sequence[tuple[Any, ...]], env: dict[str, str], restarts: int
    ) -> list[Handle]:
        actor = self._actor(role)
        if actor.num_gpus == 0:
            env = {
                **env,
                "CUDA_VISIBLE_DEVICES": "",
            }  # Ray leaves it as the node has it, and the actor would take the first GPU
        return [
            remote(cls)
            .options(
                name=f"{self.config.folder.name} {role} {i}",  # what the dashboard shows
                namespace=self.group.id.hex(),
                num_cpus=actor.num_cpus,
                num_gpus=actor.num_gpus,
                max_restarts=restarts,
                runtime_env={"env_vars": env},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=bundle
                ),
            )
            .remote(*given)
            for i, (bundle, given) in enumerate(zip(actor.bundles, arguments, strict=True))
        ]

    def _has(self, role: str) -> bool:
        return any(a.role == role for a in self.asked.actors)

    def _actor(self, role: str) -> Actor:
        return next(a for a in self.asked.actors if a.role == role)

    def _alike(self, role: str, cls: type, *arguments: Any, env: dict[str, str]) -> list[Handle]:
        """Workers that do the same, and come back when they die."""
        return self.workers(role, cls, [arguments] * self._actor(role).count, env, self.limits["restarts"])

    def _ranks(self, role: str, cls: type) -> list[Handle]:
        """Ranks of one job. All are started anew when one dies, which their pool counts."""
        count = self._actor(role).count
        given = [(rank, count, transport_of(self.config)) for rank in range(count)]
        return self.workers(role, cls, given, make_thread_env(self.config.learner.num_threads), -1)

    def rollouts(self) -> RolloutPool:
        c = self.config
        workers = self._alike(
            "rollout",
            RolloutWorker,
            c.model.path,
            c.served_model,
            c.rollout,
            c.num_tokens_limit,
            env=vllm_environment(c),
        )
        return RolloutPool(
            workers,
            tensor_parallel=c.rollout.tensor_parallel,
            max_num_seqs=c.rollout.max_num_seqs,
            **self.limits,
        )

    def rewards(self) -> RewardPool:
        c = self.config
        judges = self._judges()
        given = (c.rewards, c.combine, secrets_of(c.rewards), judges)
        return RewardPool(
            self._alike("reward", RewardWorker, *given, env=make_thread_env(c.reward.num_threads)),
            judges=[make() for make in judges.values()],
            **self.limits,
        )

    def _judges(self) -> dict[str, partial[JudgePool]]:
        """By the name of its reward, what makes the pool of a judge's engines, in any process."""
        made: dict[str, partial[JudgePool]] = {}
        for role, reward in judges_of(self.config).items():
            given = (reward, load_template(reward), secrets_of(()))
            env = judge_environment(reward, deterministic=self.config.model.deterministic)
            made[reward.name] = partial(
                JudgePool, role, self._alike(role, JudgeWorker, *given, env=env), **self.limits
            )
        return made

    def reference(self) -> ReferencePool | None:
        if not self._has("reference"):
            return None
        return ReferencePool(
            self._alike(
                "reference",
                ReferenceWorker,
                self.config.model,
                env=make_thread_env(self.config.reference.num_threads),
            ),
            **self.limits,
        )

    def scorer(self) -> EvaluatePool:
        return EvaluatePool(
            self._alike(
                "evaluate",
                EvaluateWorker,
                self.config.model,
                env=make_thread_env(self.config.evaluate.num_threads),
            ),
            **self.limits,
        )

    def harness(self, rollouts: RolloutPool) -> HarnessPool | None:
        c = self.config
        if c.harness is None:
            return None
        engines = partial(
            RolloutPool,
            list(rollouts.actors.handles),
            tensor_parallel=rollouts.tensor_parallel,
            max_num_seqs=rollouts.max_num_seqs,
            **self.limits,
        )
        settings = (c.harness, c.num_tokens_limit, c.seed, secrets_of(()))
        workers = self._alike(
            "harness", HarnessWorker, engines, *settings, env=make_thread_env(c.evaluate.num_threads)
        )
        return HarnessPool(workers, timeout_s=c.harness.timeout_s, restarts=self.limits["restarts"])

    def learner(self) -> LearnerPool:
        return LearnerPool(self._ranks("learner", LearnerWorker), **self.limits)

    def finetune(self) -> FinetunePool | None:
        if not self._has("finetune"):
            return None
        return FinetunePool(self._ranks("finetune", FinetuneWorker), **self.limits)


def spawn(config: Config, spawner: Spawner) -> Team:
    """Start all actors side by side and wait until each has answered."""
    rollouts, learner, finetune = spawner.rollouts(), spawner.learner(), spawner.finetune()
    rewards, scorer, reference = spawner.rewards(), spawner.scorer(), spawner.reference()
    groups: list[Actors[Any]] = [rewards.actors, learner.actors, scorer.actors, rollouts.actors]
    groups += [judge.actors for judge in rewards.judges]
    harness = spawner.harness(rollouts)
    groups += [pool.actors for pool in (finetune, reference, harness) if pool]
    for actors in groups:
        actors.wait_until_ready(config.cluster.start_timeout_s)
    learner.join()
    if finetune:
        finetune.join()
    if config.rollout.sleep:
        pools = {"rollout": rollouts, "learner": learner, "evaluate": scorer}
        take_turns(spawner.asked, {**pools, "finetune": finetune, "reference": reference})
    return Team(
        rollouts=rollouts,
        rewards=rewards,
        reference=learner.beginning if config.reference.share else reference,
        learner=learner,
        finetune=finetune,
        scorer=scorer,
        harness=harness,
        learner_publisher=publisher_of(config, "learner", learner, rollouts),
        finetune_publisher=publisher_of(config, "finetune", finetune, rollouts) if finetune else None,
    )


def publisher_of(
    config: Config, name: str, source: LearnerPool | FinetunePool, rollouts: RolloutPool
) -> Publisher:
    if isinstance(transport_of(config), GroupTransport):
        return GroupPublisher(name, source, rollouts, backend_of(config))
    return ParcelPublisher(source, rollouts)


def backend_of(config: Config) -> str:
    """Of the process group that weights travel by: of the actors' devices, whatever the driver's machine
    has."""
    return "nccl" if config.rollout.num_gpus > 0 and config.learner.num_gpus > 0 else "gloo"


def take_turns(asked: Plan, pools: Mapping[str, Any]) -> None:
    """One card for vLLM, training and scorers: whoever is called next gets its memory, the others wait in
    host memory."""
    sharing = {a.role: pools[a.role] for a in asked.actors if a.num_gpus > 0 and a.role in pools}
    turns = Turns(
        "rollout",
        release={role: pool.sleep if role == "rollout" else pool.offload for role, pool in sharing.items()},
        acquire={role: pool.wake if role == "rollout" else pool.reload for role, pool in sharing.items()},
    )
    for role, pool in sharing.items():
        pool.actors.turn = partial(turns.take, role)
    for role in ("reference", "learner"):
        if role in sharing:
            sharing[role].takes_turns = True
