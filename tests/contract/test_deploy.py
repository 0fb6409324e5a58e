"""The deployment files against the schemas of those who read them."""

from __future__ import annotations

import asyncio
import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from frpo.config import ConfigError
from frpo.config.service import ServiceConfig

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
KUBERNETES = "1.31"
FILES = sorted(KUBERAY.glob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(file.read_text()) if d]


# ---- ray.io/v1 as KubeRay publishes it (docs.ray.io, KubeRay CRD API reference): the fields that may stand
# in a specification


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Spec):
    mode: Literal["token", "disabled"]
    secretName: str | None = None
    enableK8sTokenAuth: bool | None = None


class AutoscalerOptions(Spec):
    resources: dict[str, Any] | None = None
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    env: list[dict[str, Any]] | None = None
    envFrom: list[dict[str, Any]] | None = None
    volumeMounts: list[dict[str, Any]] | None = None
    securityContext: dict[str, Any] | None = None
    idleTimeoutSeconds: int | None = Field(None, ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    version: Literal["v1", "v2"] | None = None


class PodTemplate(Spec):
    metadata: dict[str, Any] = {}
    spec: dict[str, Any]


class HeadGroup(Spec):
    template: PodTemplate
    rayStartParams: dict[str, str]
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    headService: dict[str, Any] | None = None
    enableIngress: bool | None = None


class WorkerGroup(Spec):
    groupName: str
    template: PodTemplate
    rayStartParams: dict[str, str]
    replicas: int | None = Field(None, ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    idleTimeoutSeconds: int | None = None
    numOfHosts: int = 1
    suspend: bool | None = None
    scaleStrategy: dict[str, list[str]] | None = None


class RayCluster(Spec):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: dict[str, str] | None = None
    gcsFaultToleranceOptions: dict[str, Any] | None = None
    suspend: bool | None = None


class RayJob(Spec):
    entrypoint: str
    rayClusterSpec: RayCluster | None = None
    clusterSelector: dict[str, str] | None = None
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = 0
    activeDeadlineSeconds: int | None = Field(None, gt=0)
    backoffLimit: int = Field(0, ge=0)
    submitterPodTemplate: PodTemplate | None = None
    metadata: dict[str, str] | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    suspend: bool | None = None


class RayService(Spec):
    serveConfigV2: str
    rayClusterConfig: RayCluster
    serveService: dict[str, Any] | None = None
    upgradeStrategy: dict[str, Any] | None = None
    excludeHeadPodFromServeSvc: bool | None = None


CUSTOM: dict[str, type[Spec]] = {"RayCluster": RayCluster, "RayJob": RayJob, "RayService": RayService}


def cluster_of(document: dict[str, Any]) -> RayCluster | None:
    if document["kind"] not in CUSTOM:
        return None
    spec: Any = CUSTOM[document["kind"]].model_validate(document["spec"])
    if isinstance(spec, RayCluster):
        return spec
    return spec.rayClusterSpec if isinstance(spec, RayJob) else spec.rayClusterConfig


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_kubernetes_takes_every_object_and_every_pod(file: Path) -> None:
    pods = 0
    for document in documents(file):
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        assert document["apiVersion"] == "ray.io/v1"
        cluster = cluster_of(document)
        assert cluster
        for name, group in [
            ("head", cluster.headGroupSpec),
            *((w.groupName, w) for w in cluster.workerGroupSpecs),
        ]:
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, **group.template.metadata},
                "spec": group.template.spec,
            }
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            pods += 1
            containers = group.template.spec["containers"]
            mounts = chain.from_iterable(container["volumeMounts"] for container in containers)
            assert {mount["name"] for mount in mounts} == {v["name"] for v in group.template.spec["volumes"]}
            assert group.template.spec["securityContext"]["runAsNonRoot"] is True
        assert cluster.authOptions
        assert cluster.authOptions.mode == "token"
        assert all(w.minReplicas <= (w.replicas or 0) <= w.maxReplicas for w in cluster.workerGroupSpecs)
    assert (pods > 0) == (file.name != "storage.yaml")


def test_a_field_that_kuberay_does_not_know_is_found() -> None:
    (document,) = documents(KUBERAY / "raycluster.yaml")
    document["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(ValueError, match=r"workerGroupSpecs\.0\.maxReplica"):
        cluster_of(document)


def test_the_plan_of_the_recipe_fits_the_cluster_of_the_job() -> None:
    from frpo.planning import plan_run
    from frpo.recipe import load_recipe

    (document,) = documents(KUBERAY / "rayjob.yaml")
    job = RayJob.model_validate(document["spec"])
    recipe = ROOT / "recipes" / Path(job.entrypoint.split()[4]).name
    assert job.entrypoint.split()[:4] == ["python", "-m", "frpo", "run"]
    asked = plan_run(load_recipe(recipe, ()))
    assert job.rayClusterSpec
    limits = [
        w.template.spec["containers"][0]["resources"]["limits"] for w in job.rayClusterSpec.workerGroupSpecs
    ]
    assert asked.num_gpus <= sum(float(limit["nvidia.com/gpu"]) for limit in limits)
    assert asked.num_cpus <= sum(float(limit["cpu"]) for limit in limits)
    assert "--run-dir /shared/" in job.entrypoint


def test_serve_reads_what_the_ray_service_gives_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    import frpo.deploy.service

    rewards, document = documents(KUBERAY / "rayservice.yaml")
    service = RayService.model_validate(document["spec"])
    deployment = ServeDeploySchema.model_validate(yaml.safe_load(service.serveConfigV2))
    (app,) = deployment.applications
    assert callable(getattr(frpo.deploy.service, app.import_path.rpartition(":")[2]))
    monkeypatch.setenv("FRPO_SERVICE_TOKEN", "x")
    config = ServiceConfig.model_validate(yaml.safe_load(rewards["data"][Path(app.args["config"]).name]))
    assert [r.name for r in config.rewards] == ["helpful", "refusal"]
    file = tmp_path / "rewards.yaml"
    file.write_text("rewards: [{kind: function, name: brief, function: 'frpo.rewards:length'}]")
    assert frpo.deploy.service.application({"config": str(file)})
    monkeypatch.delenv("FRPO_SERVICE_TOKEN")
    with pytest.raises(
        ConfigError,
        match="FRPO_SERVICE_TOKEN is not set, and the service on a cluster that others "
        "reach must know its token",
    ):
        frpo.deploy.service.application({"config": str(file)})
    file.write_text(file.read_text() + "\ntoken_env: ''")
    assert frpo.deploy.service.application({"config": str(file)})
    for group in (service.rayClusterConfig.headGroupSpec, *service.rayClusterConfig.workerGroupSpecs):
        names = {
            e["name"]: e["valueFrom"]["secretKeyRef"]["name"]
            for e in group.template.spec["containers"][0]["env"]
        }
        assert names == {"FRPO_SERVICE_TOKEN": "frpo-service"}


def test_the_cluster_launcher_takes_cluster_yaml() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    assert config["max_workers"] >= sum(
        t.get("min_workers", 0) for t in config["available_node_types"].values()
    )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 3}, schema)


def test_the_image_follows_the_install_recipe_and_is_not_root() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    users = [i for i, line in enumerate(lines) if line.startswith("USER ")]
    installs = [i for i, line in enumerate(lines) if "deploy/install.sh" in line]
    assert [lines[i] for i in users] == ["USER frpo"]
    assert len(installs) == 1
    assert users[0] < installs[0]
    copies = [line.split()[2:-1] for line in lines if line.startswith("COPY")]
    copied = set(chain.from_iterable(copies))
    assert {"pyproject.toml", "README.md", "frpo", "actors", "deploy", "recipes"} <= copied


class Cluster:
    """What Serve runs on a cluster, as its client tells it."""

    http_config = SimpleNamespace(host="127.0.0.1", port=8000)

    def __init__(self, *apps: tuple[str, str, str, str]) -> None:
        self.apps = {
            name: {"name": name, "route_prefix": route, "source": source, "deployments": {part: {}}}
            for name, route, source, part in apps
        }

    def get_serve_details(self) -> dict[str, Any]:
        return {"applications": self.apps}


FIRST = ("frpo-rewards", "/", "imperative", "gateway")


@pytest.mark.parametrize(
    ("apps", "fields", "said"),
    [
        (None, {}, None),
        ([], {}, None),
        ([FIRST], {"name": "second", "route_prefix": "/second"}, None),
        ([FIRST], {}, None),  # whose frpo serve was killed: its name is free
        ([FIRST], {"name": "second"},
         "route_prefix: / is that of frpo-rewards on this cluster; choose another, such as /second"),
        ([FIRST], {"name": "second", "route_prefix": "/b", "port": 8001},
         "port: this cluster serves at 127.0.0.1:8000 already"),
        ([], {"host": "0.0.0.0"}, "host: this cluster serves at 127.0.0.1:8000 already"),
        ([("frpo-rewards", "/", "declarative", "gateway")], {},
         "name: frpo-rewards is served on this cluster already"),
        ([("frpo-rewards", "/", "imperative", "Other")], {},
         "name: frpo-rewards is served on this cluster already"),
    ],
)  # fmt: skip
def test_a_service_takes_nothing_from_another(
    apps: Any, fields: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import frpo.deploy.service

    monkeypatch.setattr(frpo.deploy.service, "serve_client", lambda: None if apps is None else Cluster(*apps))
    rewards = [{"kind": "function", "name": "brief", "function": "frpo.rewards:length"}]
    config = ServiceConfig.model_validate({"rewards": rewards, **fields})
    if said is None:
        frpo.deploy.service.refuse_if_taken(config)
    else:
        with pytest.raises(ConfigError) as error:
            frpo.deploy.service.refuse_if_taken(config)
        assert str(error.value).startswith(said)


class Replica:
    """What Serve's handle of a reward does at each call: raise, or answer one part per item."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.score = self

    async def remote(self, items: list[Any]) -> list[Any]:
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer
        return [(1.0, None) for _ in items]


@pytest.mark.parametrize("kind", ["queue", "died", "failed"])
def test_a_full_queue_is_told_at_once_and_only_a_dead_replica_is_asked_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError

    import frpo.deploy.service
    from frpo.service.app import Overloaded, Unavailable

    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", wait)
    rewards = [{"kind": "function", "name": "brief", "function": "frpo.rewards:length"}]
    backend = frpo.deploy.service.Handles.__new__(frpo.deploy.service.Handles)
    backend.config = ServiceConfig.model_validate(
        {"rewards": rewards, "replicas": {"max_queued_requests": 7}}
    )
    error = {
        "queue": BackPressureError(7, 7),
        "died": RayActorError(),
        "failed": RayTaskError("score", "traceback", ValueError("secret")),
    }[kind]
    replica = Replica(error, None)
    backend.handles = {"brief": replica}
    if kind == "died":
        assert asyncio.run(backend._ask("brief", "score", [None, None])) == [(1.0, None)] * 2
        assert len(waits) == 1
        return
    said = {
        "queue": "7 requests wait for the reward 'brief' (replicas.max_queued_requests)",
        "failed": "the reward 'brief' failed: ValueError",
    }
    with pytest.raises((Overloaded, Unavailable)) as raised:
        asyncio.run(backend._ask("brief", "score", [None]))
    assert str(raised.value) == said[kind]
    assert isinstance(raised.value, Overloaded) == (kind == "queue")
    assert waits == []
    assert replica.answers == [None]  # it was asked once
