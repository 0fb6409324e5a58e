"""What the pool of rollout workers says when it gives up on one, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from frpo.actors.rollout import RolloutPool, StaleWeights
from frpo.roles import WorkerFailed
from frpo.types import Prompt, Sampling, Ticket


def test_a_worker_that_never_has_the_right_weights_is_not_called_dead() -> None:
    nobody: Any = None
    pool = RolloutPool([nobody], timeout_s=1, restarts=3, tensor_parallel=1, max_num_seqs=4)
    error = RayTaskError("generate", "traceback", StaleWeights("runs policy version 1, asked for 2"))
    with pytest.raises(
        WorkerFailed,
        match=r"^rollout worker 0 was given the weights 3 times and still runs policy version 1, asked for 2",
    ):
        pool._recover(0, error, {0: 0})


def test_who_gives_up_waits_for_no_engine() -> None:
    """One may be dead, or hang, and be the reason why a run ends: that is told at once."""
    asked: list[str] = []
    nothing = SimpleNamespace(future=lambda: SimpleNamespace(add_done_callback=lambda call: None))

    def method(name: str) -> Any:
        def ask(*given: Any) -> Any:
            asked.append(name)
            return nothing

        return SimpleNamespace(remote=ask)

    handles: Any = [SimpleNamespace(draw=method("draw"), give_up=method(f"give_up {i}")) for i in range(2)]
    pool = RolloutPool(handles, timeout_s=1, restarts=3, tensor_parallel=1, max_num_seqs=4)
    session = pool.open(Sampling(4, 1))
    session.begin(Ticket(0, Prompt("p", "?", np.array([9], np.int32), "t", {}), 0), 1)
    session.close()
    assert asked == ["draw", "give_up 0", "give_up 1"]


@pytest.mark.parametrize(
    ("idle", "alone", "given"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, False)],
)
def test_an_engine_that_is_back_is_given_weights_unless_the_learner_would_have_to_send_them_amid_an_update(
    idle: bool, alone: bool, given: bool
) -> None:
    nobody: Any = None
    pool = RolloutPool([nobody], timeout_s=1, restarts=3, tensor_parallel=1, max_num_seqs=4)
    pool.restores_alone = alone
    asked: list[int] = []
    pool.actors.when_back = asked.append
    assert pool.open(Sampling(4, 1)).engines.restore(0, idle) is given
    assert asked == [0] * given


def test_a_publish_finds_its_place_among_the_calls_that_ray_runs_at_once() -> None:
    nobody: Any = None
    pool = RolloutPool([nobody], timeout_s=1, restarts=3, tensor_parallel=1, max_num_seqs=4096)
    assert pool.open(Sampling(16, 1)).room == 512
    assert pool.open(Sampling(2, 1)).room == 900
