"""The reward service on Ray Serve: one deployment per reward, batched and scaled by itself, behind one HTTP
ingress.

request -> proxy -> Gateway (frpo.service.app: token, limits, formats) -> a RewardReplica per reward ->
weighted sum
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from frpo.actors._vllm import judge_environment
from frpo.config import ConfigError, JudgeReward, ModelReward, RewardConfig, ServeReward, find_cluster
from frpo.config.service import ReplicaConfig, ServiceConfig, token_digest
from frpo.joining import join
from frpo.planning import make_thread_env
from frpo.preflight import check_rewards
from frpo.recipe import read_section
from frpo.rewards.http import RETRY_PAUSES_S, draw_pauses
from frpo.rewards.parts import Part, part_of
from frpo.rewards.scoring import RewardScorer, combine_parts, route_items
from frpo.rewards.template import JudgeTemplate, load_template
from frpo.roles import WorkerFailed
from frpo.secrets import NO_SECRETS, Secrets, secrets_of
from frpo.service.app import Overloaded, Unavailable, make_app
from frpo.service.port import held_port
from frpo.types import Decoding, Item, Reply, Reward

OBJECT_STORE_BYTES = 2**28
START_LIMIT_S = 600
"""Longest wait for all rewards to be up."""
REQUESTS_AT_ONCE = 8
"""For functions and endpoints, of one replica: more wait for its processes anyway."""


class RewardReplica:
    """One reward in one process. Requests for a model that wait together are scored together; each request
    for a function is a call of its own, so that one that hangs is nobody else's."""

    def __init__(self, reward: RewardConfig, replicas: ReplicaConfig, secrets: Secrets = NO_SECRETS) -> None:
        secrets.place()
        self.reward = reward
        assert not isinstance(reward, ServeReward)  # refused by ServiceConfig
        self.one = RewardScorer([reward])
        self.one.load()
        self.threads = ThreadPoolExecutor(REQUESTS_AT_ONCE)
        batched: Any = self._batched
        batched.set_max_batch_size(replicas.max_batch_requests)
        batched.set_batch_wait_timeout_s(replicas.batch_wait_s)

    async def score(self, items: list[Item]) -> list[Part]:
        """One value, or None and why, per item."""
        if isinstance(self.reward, ModelReward):
            parts: list[Part] = await self._batched(items)
            return parts
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.one.parts, self.reward, items)

    @serve.batch
    async def _batched(self, requests: list[list[Item]]) -> list[list[Part]]:
        items = list(itertools.chain.from_iterable(requests))
        parts = iter(await asyncio.to_thread(self.one.parts, self.reward, items))
        return [list(itertools.islice(parts, len(request))) for request in requests]


class JudgeReplica:
    """One engine of a judge in one process: requests share its steps, on a GPU."""

    def __init__(self, reward: JudgeReward, template: JudgeTemplate, secrets: Secrets = NO_SECRETS) -> None:
        from frpo.actors._judge import start_engine

        secrets.place()
        self.reward, self.engine = reward, start_engine(reward, template)

    async def score(self, items: list[Item]) -> list[Part]:
        """One value, or None and why, per item."""
        return [part_of(value, self.reward) for value in await self.engine.score(items)]

    async def chat(self, messages: Sequence[dict[str, str]], decoding: Decoding) -> Reply | Exception:
        return await self.engine.chat(messages, decoding)


class Handles:
    """A service.app.Backend over the replicas of the Serve application `app`."""

    def __init__(self, config: ServiceConfig, app: str) -> None:
        self.config, self.app = config, app
        names = [reward.name for reward in config.rewards]
        self.handles = {name: serve.get_deployment_handle(deployment_of(name), app) for name in names}

    async def score(self, items: Sequence[Item], names: Sequence[str]) -> list[Reward]:
        asked = [reward for reward in self.config.rewards if reward.name in names]
        mine: dict[str, list[Item]] = {}
        for reward in asked:
            mine[reward.name] = [items[i] for i in route_items(reward, items)]
        needed = [name for name, chosen in mine.items() if chosen]
        answers = await asyncio.gather(*(self._ask(name, "score", mine[name]) for name in needed))
        return combine_parts(asked, self.config.combine, items, dict(zip(needed, answers, strict=True)))

    async def chat(
        self, name: str, messages: Sequence[dict[str, str]], decoding: Decoding
    ) -> Reply | Exception:
        answer: Reply | Exception = await self._ask(name, "chat", messages, decoding)
        return answer

    async def _ask(self, name: str, method: str, *given: Any) -> Any:
        """A request whose replica dies is asked again until its time is up: scoring is idempotent."""
        for pause in draw_pauses(*RETRY_PAUSES_S):
            try:
                return await getattr(self.handles[name], method).remote(*given)
            except BackPressureError:
                waiting = self.config.replicas.max_queued_requests
                raise Overloaded(
                    f"{waiting} requests wait for the reward {name!r} (replicas.max_queued_requests)"
                ) from None
            except (RayActorError, DeploymentUnavailableError):
                await asyncio.sleep(pause)
            except RayTaskError as error:
                raise Unavailable(f"the reward {name!r} failed: {type(error.cause).__name__}") from None
        raise AssertionError("the pauses have no end")

    async def ready(self) -> bool:
        status = (await asyncio.to_thread(serve.status)).applications.get(self.app)
        return status is not None and all(
            deployment.status == "HEALTHY" for deployment in status.deployments.values()
        )


def build_application(config: ServiceConfig, digest: bytes | None) -> Any:
    """The Serve application. `digest` is the SHA-256 of its token, 32 bytes: the gateway's process may lack
    the variable.

    The keys of the rewards are taken from this process's environment.
    """
    children = [
        _bind_judge(reward, config.replicas)
        if isinstance(reward, JudgeReward)
        else _bind_reward(reward, config.replicas)
        for reward in config.rewards
    ]
    ingress: Any = serve.deployment(serve.ingress()(Gateway))
    options = {"name": "gateway", "max_ongoing_requests": 1024, "ray_actor_options": {"num_cpus": 0.25}}
    return ingress.options(**options).bind(config, digest, *children)


def _bind_reward(reward: RewardConfig, replicas: ReplicaConfig) -> Any:
    replica: Any = serve.deployment(RewardReplica)
    options = options_of(
        reward, replicas, replicas, make_thread_env(replicas.num_threads), scale_of(replicas)
    )
    return replica.options(**options).bind(reward, replicas, secrets_of([reward]))


def _bind_judge(reward: JudgeReward, replicas: ReplicaConfig) -> Any:
    """As many engines, and each as large, as the judge itself says."""
    replica: Any = serve.deployment(JudgeReplica)
    options = options_of(
        reward, reward, replicas, judge_environment(reward), {"num_replicas": reward.num_workers}
    )
    return replica.options(**options).bind(reward, load_template(reward), secrets_of([reward]))


def options_of(
    reward: RewardConfig,
    sizes: ReplicaConfig | JudgeReward,
    replicas: ReplicaConfig,
    env: dict[str, str],
    scale: dict[str, Any],
) -> dict[str, Any]:
    """Of the deployment of a reward whose processes have these sizes."""
    return {
        "name": deployment_of(reward.name),
        "ray_actor_options": {
            "num_cpus": sizes.num_cpus,
            "num_gpus": sizes.num_gpus,
            "runtime_env": {"env_vars": env},
        },
        # they wait inside the replica: what waits before it is asked for again and again, with pauses that
        # leave the model idle
        "max_ongoing_requests": replicas.max_batch_requests + replicas.max_queued_requests,
        "max_queued_requests": replicas.max_queued_requests,
        **scale,
    }


def scale_of(replicas: ReplicaConfig) -> dict[str, Any]:
    """How many of each there are, as options of a deployment."""
    if replicas.min_replicas == replicas.max_replicas:
        return {"num_replicas": replicas.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            # another replica where more wait than one batch takes
            "target_ongoing_requests": replicas.max_batch_requests,
        }
    }


class Gateway:
    """The HTTP side, and what `kind: serve` calls. `digest` is the SHA-256 of the token, 32 bytes, or
    None."""

    def __init__(self, config: ServiceConfig, digest: bytes | None, *children: DeploymentHandle[Any]) -> None:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its access log
        self.config, self.digest = config, digest
        self.backend = Handles(config, serve.get_replica_context().app_name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.config, self.backend, self.digest)

    async def score(self, items: list[Item], names: Sequence[str]) -> list[Reward]:
        """For callers in the same Ray cluster, who wait as long as they like."""
        return await self.backend.score(items, names or self.names())

    def names(self) -> list[str]:
        return [reward.name for reward in self.config.rewards]


def application(args: dict[str, str]) -> Any:
    """For Serve's own configuration files (`serve deploy`, RayService): `config` is the path of the service's
    YAML.

    Built in a process of the cluster, which must know the token. Raises ConfigError.
    """
    config = read_section(Path(args["config"]), (), ServiceConfig)
    check_rewards(config.rewards)
    return build_application(config, token_digest(config, joined=True))


def deployment_of(reward: str) -> str:
    return f"reward-{reward}"


class Holder:
    """An actor whose name is that of a service: it is there for as long as the `frpo serve` that made it."""

    def here(self) -> bool:
        return True


def hold_name(config: ServiceConfig) -> Any:
    """Take the service's name in this cluster, for as long as what is returned. Raises ConfigError when it is
    taken."""
    remote: Any = ray.remote(Holder)
    try:
        holder = remote.options(name=config.name, namespace="frpo-services", num_cpus=0).remote()
        # of two at the same moment, the later hears of it here
        ray.get(holder.here.remote(), timeout=START_LIMIT_S)
    except (ValueError, RayActorError):
        raise name_taken(config) from None
    return holder


def name_taken(config: ServiceConfig) -> ConfigError:
    return ConfigError(
        f"name: {config.name} is served on this cluster already; give this service a name and a route_prefix "
        "of its own"
    )


def refuse_if_taken(config: ServiceConfig) -> None:
    """That nothing on this cluster would be replaced or left unheard. Raises ConfigError.

    Serve itself replaces an application of the same name, and keeps the first host and port without a word.
    An application that its `frpo serve` left behind, by a kill, is replaced.
    """
    client = serve_client()
    if client is None:
        return
    at = client.http_config
    for field, mine, theirs in (("host", config.host, at.host), ("port", config.port, at.port)):
        if mine != theirs:
            raise ConfigError(
                f"{field}: this cluster serves at {at.host}:{at.port} already; use that, and a route_prefix"
            )
    for app in client.get_serve_details()["applications"].values():
        left_behind = app["source"] == "imperative" and "gateway" in app["deployments"]
        if app["name"] == config.name and not left_behind:
            raise name_taken(config)
        if app["name"] != config.name and app["route_prefix"] == config.route_prefix:
            taken = f"{config.route_prefix} is that of {app['name']} on this cluster"
            raise ConfigError(f"route_prefix: {taken}; choose another, such as /{config.name}")


def serve_client() -> Any:
    """The client of what Serve runs on this cluster; None where it does not run."""
    return _get_global_client(raise_if_no_controller_running=False)


def deploy(config: ServiceConfig, digest: bytes | None) -> None:
    """Wait until every reward is up.

    Raises ConfigError when another service took the route at the same moment, WorkerFailed that names the
    rewards that do not come up.
    """
    target = serve.RunTarget(
        build_application(config, digest), name=config.name, route_prefix=config.route_prefix
    )
    try:
        serve.run_many([target], wait_for_applications_running=False)
    except RayServeException as error:
        raise ConfigError(f"route_prefix: {error}") from None
    until = time.monotonic() + START_LIMIT_S
    while (app := serve.status().applications[config.name]).status != ApplicationStatus.RUNNING:
        if app.status == ApplicationStatus.DEPLOY_FAILED or time.monotonic() > until:
            lacking = [
                f"{name}: {deployment.message or deployment.status}"
                for name, deployment in app.deployments.items()
                if deployment.status != "HEALTHY"
            ]
            raise WorkerFailed(
                f"The service {config.name} did not come up within {START_LIMIT_S} s. "
                + "\n".join([app.message, *lacking])
            )
        time.sleep(0.2)


@contextmanager
def serve_on_cluster(config: ServiceConfig, digest: bytes | None) -> Iterator[str]:
    """Serve on a Ray cluster that is connected already; gives the URL when every reward is up.

    At the end the application is taken down, its last requests answered. Raises ConfigError with nothing of
    others touched, WorkerFailed when a reward does not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    holder = hold_name(config)
    refuse_if_taken(config)
    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        deploy(config, digest)
        yield config.url
    finally:
        serve.delete(config.name)
        ray.kill(holder)


def serve_forever(config: ServiceConfig, address: str | None, digest: bytes | None) -> None:
    """Join or start Ray, serve, and wait for a signal.

    Raises ConfigError, WorkerFailed when Ray does not start.
    """
    join(address, OBJECT_STORE_BYTES, "--address")
    # where Ray is started here, the caller holds the port
    first = find_cluster(address) is not None and serve_client() is None
    try:
        with held_port(config) if first else nullcontext(), serve_on_cluster(config, digest) as url:
            note = "" if digest else ", without a token"
            print(f"Serving at {url}{note}. Ctrl-C stops it.", flush=True)
            while True:
                time.sleep(3600)
    finally:
        ray.shutdown()
