"""One Ray cluster and one tiny tied model for all tests of actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from frpo import testbed
from tests.support import runs
from tests.support.heads import Head, started


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    runs.start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained testbed model: 2 layers, head_dim 32, tied embeddings."""
    folder = tmp_path_factory.mktemp("model") / "model"
    testbed.write_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started(tmp_path_factory.mktemp("head")) as found:
        yield found
