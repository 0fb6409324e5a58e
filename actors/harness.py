"""lm-evaluation-harness on the engines that are up already: one actor that turns its requests into calls of
the rollout workers.

The harness brings tasks, prompts, few-shot examples and metrics; a policy is loaded into the engines once for
all tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from frpo.actors._calls import Actors, ProcessId, this_process
from frpo.actors.rollout import RolloutPool
from frpo.config import HarnessConfig
from frpo.harness import load_tasks
from frpo.records import BenchmarkScore
from frpo.secrets import NO_SECRETS, Secrets


class HarnessWorker:
    """`engines` makes the pool of the rollout workers in this process; `limit` is their longest sequence,
    tokens."""

    def __init__(
        self,
        engines: Callable[[], RolloutPool],
        harness: HarnessConfig,
        limit: int,
        seed: int,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        secrets.place()
        self.pool = engines()
        self.harness, self.limit, self.seed = harness, limit, seed

    def ping(self) -> ProcessId:
        import lm_eval  # noqa: F401

        return this_process()

    def evaluate(self, policy: str) -> tuple[BenchmarkScore, ...]:
        """Every metric of every task, for a saved policy (Hugging Face or PEFT folder)."""
        from lm_eval import simple_evaluate

        from frpo.actors._engine_lm import VERSION, EngineLM

        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self.pool.load_policy(Path(policy), VERSION)
        tasks, manager = load_tasks(self.harness)
        results: Any = simple_evaluate(
            model=EngineLM(self.pool, policy, self.limit, self.seed),
            tasks=tasks,
            task_manager=manager,
            limit=self.harness.limit,
            num_fewshot=self.harness.num_fewshot,
            apply_chat_template=self.harness.chat,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=self.seed % 2**31,
        )
        return tuple(scores_of(results))


def scores_of(results: dict[str, Any]) -> Iterator[BenchmarkScore]:
    """lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    for task, row in results["results"].items():
        count = results["n-samples"].get(task, {}).get("effective")
        for key, value in row.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{name}")
            yield BenchmarkScore(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                se=float(error) if isinstance(error, int | float) else None,
                num_examples=count,
            )


class HarnessPool:
    """The one harness actor."""

    def __init__(
        self, handles: Sequence[ActorHandle[HarnessWorker]], *, timeout_s: float, restarts: int
    ) -> None:
        self.actors: Actors[HarnessWorker] = Actors(
            "harness", handles, timeout_s=timeout_s, restarts=restarts
        )

    def evaluate(self, policy: Path) -> tuple[BenchmarkScore, ...]:
        return self.actors.call(0, HarnessWorker.evaluate, str(policy.absolute())).result()
