"""Environment of all tests: one thread, no hub, a Ray without token on this machine alone. And what the tests
of actors share: one Ray cluster and one tiny tied model."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# torch and transformers leave a million objects alive, which the default would look at again every few tests
gc.set_threshold(50_000, 20, 100)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("RAY_ADDRESS", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker of xdist has told all by now. Its interpreter would go through two million objects three times
    before it ends, 6 s; left alone they let a library of C++ tell at great length what it leaves behind."""
    if hasattr(config, "workerinput"):
        gc.freeze()
        atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))  # pytest has it until then


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    from tests.support import runs

    runs.start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained testbed model: 2 layers, head_dim 32, tied embeddings."""
    from frpo import testbed

    folder = tmp_path_factory.mktemp("model") / "model"
    testbed.write_model(folder, seed=0)
    return folder
