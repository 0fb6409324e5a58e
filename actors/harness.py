"""lm-evaluation-harness on the engines that are up already: one actor that turns its requests into calls of
the rollout workers.

The harness brings tasks, prompts, few-shot examples and metrics; a policy is loaded into the engines once for
all tasks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors import _calls
from actors.rollout import RolloutPool
from frpo.config import HarnessConfig
from frpo.harness import tasks_of
from frpo.records import BenchmarkScore
from frpo.secrets import NO_SECRETS, Secrets


class HarnessWorker:
    """`rollouts` are the handles of the rollout workers; `limit` is their longest sequence, tokens."""

    def __init__(
        self,
        rollouts: Sequence[ActorHandle[Any]],
        tensor_parallel: int,
        timeout_s: float,
        restarts: int,
        harness: HarnessConfig,
        limit: int,
        seed: int,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        secrets.place()
        self.pool = RolloutPool(
            rollouts, timeout_s=timeout_s, restarts=restarts, tensor_parallel=tensor_parallel
        )
        self.harness, self.limit, self.seed = harness, limit, seed

    def ping(self) -> int:
        import lm_eval  # noqa: F401

        return os.getpid()

    def evaluate(self, policy: str) -> tuple[BenchmarkScore, ...]:
        """Every metric of every task, for a saved policy (Hugging Face or PEFT folder)."""
        from lm_eval import simple_evaluate

        from actors._engine_lm import VERSION, EngineLM

        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self.pool.load_policy(Path(policy), VERSION)
        h = self.harness
        tasks, manager = tasks_of(h)
        found: Any = simple_evaluate(
            model=EngineLM(self.pool, policy, self.limit, self.seed),
            tasks=tasks,
            task_manager=manager,
            limit=h.limit,
            num_fewshot=h.num_fewshot,
            apply_chat_template=h.chat,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=self.seed % 2**31,
        )
        return tuple(scores_of(found))


def scores_of(found: dict[str, Any]) -> Iterator[BenchmarkScore]:
    """lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            se = row.get(f"{metric}_stderr,{name}")
            count = found["n-samples"].get(task, {}).get("effective")
            yield BenchmarkScore(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                se=float(se) if isinstance(se, int | float) else None,
                num_examples=count,
            )


class HarnessPool:
    """The one harness actor."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("harness", handles, timeout_s=timeout_s, restarts=restarts)

    def evaluate(self, policy: Path) -> tuple[BenchmarkScore, ...]:
        found: tuple[BenchmarkScore, ...] = self.actors.call(0, "evaluate", str(policy.absolute())).result()
        return found
