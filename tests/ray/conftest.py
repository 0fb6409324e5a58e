"""Ranks that the tests of learning share, and a head as an operator starts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from frpo.actors.finetune import FinetunePool, FinetuneWorker
from frpo.actors.learner import LearnerPool, LearnerWorker
from frpo.actors.rollout import RolloutPool
from frpo.config import ModelConfig
from tests.support.engines import engine
from tests.support.heads import Head, started
from tests.support.learners import SmallChunks, spawn, stop

TOGETHER = {
    **dict.fromkeys(("test_defences", "test_learner", "test_ranks", "test_scores"), "ranks"),
    **dict.fromkeys(("test_ahead", "test_rollout"), "engine"),
}
"""Files whose tests share actors, which take a quarter of a minute to start: on one worker of xdist."""


class ByFile(LoadFileScheduling):  # type: ignore[misc]
    """`--dist loadfile`, with files that are TOGETHER as one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return TOGETHER.get(Path(file).stem, file)


LONGEST = "test_run.py"
LEAVES_RAY = "test_nodes.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes three minutes first, so that it is not the one that all others wait for; last the
    one that ends the Ray in which the shared actors are."""
    items.sort(key=lambda item: (item.path.name == LEAVES_RAY, item.path.name != LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def pool(ray_cluster: None, tiny_model: Path) -> Iterator[RolloutPool]:
    pool = engine(ModelConfig(path=str(tiny_model)))
    yield pool
    stop(pool)


@pytest.fixture(scope="session")
def learner(ray_cluster: None) -> Iterator[LearnerPool]:
    pool = spawn(LearnerWorker, LearnerPool, 1)
    yield pool
    stop(pool)


@pytest.fixture(scope="session")
def two_ranks(ray_cluster: None) -> Iterator[LearnerPool]:
    pool = spawn(SmallChunks, LearnerPool, 2, restarts=1)
    yield pool
    stop(pool)


@pytest.fixture(scope="session")
def finetune(ray_cluster: None) -> Iterator[FinetunePool]:
    pool = spawn(FinetuneWorker, FinetunePool, 1)
    yield pool
    stop(pool)


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started(tmp_path_factory.mktemp("head")) as found:
        yield found
