"""The reward service on Ray Serve: one deployment per reward, batched and scaled by itself, behind one HTTP ingress.

request -> proxy -> Gateway (frpo.service.app: token, limits, formats) -> a RewardReplica per reward -> weighted sum
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from frpo.config import RewardConfig, ServeReward
from frpo.config.service import ReplicaConfig, ServiceConfig
from frpo.joining import join
from frpo.planning import threads
from frpo.preflight import check_rewards
from frpo.recipe import read
from frpo.rewards.http import RETRY_PAUSES_S, pauses
from frpo.scoring import Item, ModelScorer, Part, guarded, routed, scorer_of, together
from frpo.service.app import Overloaded, Unavailable, make_app
from frpo.types import Reward

APP = "frpo-rewards"
OBJECT_STORE_BYTES = 2**28


class RewardReplica:
    """One reward in one process. Requests that wait together are scored together."""

    def __init__(self, reward: RewardConfig, replicas: ReplicaConfig) -> None:
        self.reward = reward
        assert not isinstance(reward, ServeReward)  # refused by ServiceConfig
        self.scorer = scorer_of(reward, f"rewards.{reward.name}")
        if isinstance(self.scorer, ModelScorer):
            self.scorer.load()
        batched: Any = self._batched
        batched.set_max_batch_size(replicas.max_batch_requests)
        batched.set_batch_wait_timeout_s(replicas.batch_wait_s)

    async def score(self, items: list[Item]) -> list[Part]:
        """One value, or None and why, per item."""
        found: list[Part] = await self._batched(items)
        return found

    @serve.batch
    async def _batched(self, requests: list[list[Item]]) -> list[list[Part]]:
        items = [item for request in requests for item in request]
        parts = await asyncio.to_thread(guarded, self.scorer, items, self.reward)
        ends = [0]
        for request in requests:
            ends.append(ends[-1] + len(request))
        return [parts[a:b] for a, b in itertools.pairwise(ends)]


class Handles:
    """A service.app.Backend over the replicas."""

    def __init__(self, config: ServiceConfig, handles: dict[str, DeploymentHandle[Any]]) -> None:
        self.config, self.handles = config, handles

    async def score(self, items: Sequence[Item], names: Sequence[str]) -> list[Reward]:
        asked = [r for r in self.config.rewards if r.name in names]
        mine = {r.name: [items[i] for i in routed(r, items)] for r in asked}
        needed = [name for name, chosen in mine.items() if chosen]
        answers = await asyncio.gather(*(self._ask(name, mine[name]) for name in needed))
        return together(asked, self.config.combine, items, dict(zip(needed, answers, strict=True)))

    async def _ask(self, name: str, items: list[Item]) -> list[Part]:
        """A request whose replica dies is asked again until its time is up: scoring is idempotent."""
        for pause in pauses(*RETRY_PAUSES_S):
            try:
                found: list[Part] = await self.handles[name].score.remote(items)
                return found
            except BackPressureError:
                waiting = self.config.replicas.max_queued_requests
                raise Overloaded(f"{waiting} requests wait for the reward {name!r} (replicas.max_queued_requests)") from None
            except (RayActorError, DeploymentUnavailableError):
                await asyncio.sleep(pause)
            except RayTaskError as error:
                raise Unavailable(f"the reward {name!r} failed: {type(error.cause).__name__}") from None
        raise AssertionError("the pauses have no end")

    async def ready(self) -> bool:
        status = (await asyncio.to_thread(serve.status)).applications.get(APP)
        return status is not None and all(d.status == "HEALTHY" for d in status.deployments.values())


def build(config: ServiceConfig) -> Any:
    """The Serve application. The token is read where the gateway runs, never sent through Ray."""
    r = config.replicas
    scale: dict[str, Any] = (
        {"num_replicas": r.min_replicas}
        if r.min_replicas == r.max_replicas
        else {
            "autoscaling_config": {
                "min_replicas": r.min_replicas,
                "max_replicas": r.max_replicas,
                "target_ongoing_requests": r.max_batch_requests,  # another replica where more wait than one batch takes
            }
        }
    )
    actor = {
        "num_cpus": r.num_cpus,
        "num_gpus": r.num_gpus,
        "runtime_env": {"env_vars": threads(r.num_threads)},
    }
    replica: Any = serve.deployment(RewardReplica)
    children = [
        replica.options(
            name=_deployment(reward.name),
            ray_actor_options=actor,
            # they wait inside the replica: what waits before it is asked for again and again, with pauses that leave the model idle
            max_ongoing_requests=r.max_batch_requests + r.max_queued_requests,
            max_queued_requests=r.max_queued_requests,
            **scale,
        ).bind(reward, r)
        for reward in config.rewards
    ]

    def handles() -> Handles:
        found = {reward.name: serve.get_deployment_handle(_deployment(reward.name), APP) for reward in config.rewards}
        return Handles(config, found)

    def app() -> Any:
        return make_app(config, handles())

    class Gateway:
        def __init__(self, *children: DeploymentHandle[Any]) -> None:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its access log
            self.backend = handles()

        async def score(self, items: list[Item], names: Sequence[str]) -> list[Reward]:
            """For callers in the same Ray cluster (kind: serve), who wait as long as they like."""
            return await self.backend.score(items, names or self.names())

        def names(self) -> list[str]:
            return [r.name for r in config.rewards]

    ingress: Any = serve.deployment(serve.ingress(app)(Gateway))
    return ingress.options(name="gateway", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.25}).bind(*children)


def application(args: dict[str, str]) -> Any:
    """For Serve's own configuration files (`serve deploy`, RayService): `config` is the path of the service's YAML. Raises ConfigError."""
    config = read(Path(args["config"]), (), ServiceConfig)
    check_rewards(config.rewards)
    return build(config)


def _deployment(reward: str) -> str:
    return f"reward-{reward}"


def start(config: ServiceConfig) -> str:
    """Serve on a Ray cluster that is connected already; returns the URL. Waits until every reward is up."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(build(config), name=APP, route_prefix="/")
    return f"http://{config.host}:{config.port}"


def serve_forever(config: ServiceConfig, address: str | None) -> None:
    """Join or start Ray, serve, and wait for a signal; the application goes down with it, its last requests answered."""
    join(address, OBJECT_STORE_BYTES)
    try:
        print(f"Serving at {start(config)}{'' if config.token else ', without a token'}. Ctrl-C stops it.", flush=True)
        while True:
            time.sleep(3600)
    finally:
        serve.delete(APP)
        ray.shutdown()
