"""What the pool of rollout workers says when it gives up on one, without Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RayTaskError

from actors.rollout import RolloutPool, StaleWeights
from frpo.roles import WorkerFailed


def test_a_worker_that_never_has_the_right_weights_is_not_called_dead() -> None:
    nobody: Any = None
    pool = RolloutPool([nobody], timeout_s=1, restarts=3, tensor_parallel=1, max_num_seqs=4)
    error = RayTaskError("generate", "traceback", StaleWeights("runs policy version 1, asked for 2"))
    with pytest.raises(
        WorkerFailed,
        match=r"^rollout worker 0 was given the weights 3 times and still runs policy version 1, asked for 2",
    ):
        pool._recover(0, error, {0: 0})
