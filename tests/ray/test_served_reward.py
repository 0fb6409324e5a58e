"""kind: serve. The rewards of a run asked of a service in the same Ray cluster, by handle."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frpo.config import ConfigError, FunctionReward, ServeReward
from frpo.config.service import ServiceConfig
from frpo.rewards.scoring import RewardScorer
from frpo.types import Completion, Group, Item, Prompt
from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[ServiceConfig]:
    from ray import serve

    from frpo.deploy.service import serve_on_cluster

    port = runs.free_port()
    rewards = [
        {
            "kind": "function",
            "name": "right",
            "function": "frpo.rewards:exact_answer",
            "weight": 2.0,
            "tasks": ["sum"],
        },
        {
            "kind": "function",
            "name": "short",
            "function": "frpo.rewards:length",
            "arguments": {"max_words": 2},
        },
    ]
    config = ServiceConfig.model_validate({"rewards": rewards, "port": port, "replicas": {"num_cpus": 0.1}})
    with serve_on_cluster(config, None):
        yield config
    serve.shutdown()


def group(index: int, task: str, *texts: str) -> Group:
    one = np.zeros(1, np.int32)
    completions = tuple(Completion(one, np.zeros(1, np.float32), one, t, "stop") for t in texts)
    return Group(index, Prompt(str(index), "1 + 1?", one, task, {"answer": "2"}), completions)


def pool(*rewards: Any) -> Any:
    import ray

    from frpo.actors.reward import RewardPool, RewardWorker

    handle: Any = ray.remote(RewardWorker).options(num_cpus=0.1).remote(rewards, "weighted")
    return RewardPool([handle], timeout_s=120, restarts=0)


def test_it_scores_as_the_same_rewards_do_in_the_run(service: ServiceConfig) -> None:
    asked = pool(
        ServeReward(kind="serve", name="far"),
        FunctionReward(kind="function", name="near", function="frpo.rewards:length"),
    )
    groups = [group(0, "sum", "2", "3", "2 and more words"), group(1, "chat", "2", "a b c")]
    for g in groups:
        found = asked.score(g).result()
        here = RewardScorer(service.rewards).score(
            [Item(g.prompt.text, c.text, g.prompt.task, g.prompt.columns) for c in g.completions]
        )
        assert [r.parts["far"] for r in found] == [r.total for r in here]
        assert [r.total for r in found] == [(r.total or 0.0) + 1.0 for r in here]
    (one, _) = pool(ServeReward(kind="serve", name="far", rewards=("right",))).score(groups[1]).result()
    assert (one.total, one.error) == (
        None,
        "far: no reward applies to task 'chat'; name it in rewards.*.tasks",
    )


def test_a_killed_gateway_loses_nothing(service: ServiceConfig) -> None:
    asked = pool(ServeReward(kind="serve", name="far"))
    assert [r.total for r in asked.score(group(0, "sum", "2")).result()] == [3.0]
    (gateway,) = runs.replicas("gateway")
    os.kill(gateway.pid, signal.SIGKILL)
    calls = []
    for i in range(10):
        calls.append(asked.score(group(i, "sum", "2", "3")))
        time.sleep(0.1)
    assert [[r.total for r in c.result()] for c in calls] == [[3.0, 1.0]] * 10


def test_what_is_not_served_is_said_before_the_start(service: ServiceConfig, tmp_path: Path) -> None:
    from frpo.actors.reward import check_services_run

    check_services_run([ServeReward(kind="serve", name="far", rewards=("right",))])
    for reward, message in (
        (
            ServeReward(kind="serve", name="far", app="other"),
            r"rewards\.0\.app: no Serve application 'other' .*it has: frpo-rewards",
        ),
        (
            ServeReward(kind="serve", name="far", rewards=("wrong",)),
            r"rewards\.0\.rewards: frpo-rewards has no reward 'wrong'; it has right, short",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_services_run([reward])
