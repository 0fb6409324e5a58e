"""The reward actor and the Serve replica as plain classes: what a group becomes, and who waits for whom."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frpo.config import FunctionReward
from frpo.config.service import ReplicaConfig
from frpo.types import Completion, Group, Item, Prompt

HANGS = """
import time
def grade(completions, **_):
    if any("bad" in str(c) for c in completions): time.sleep(100)
    return [float(len(c)) for c in completions]
def chat(prompts, completions, completion_ids, trainer_state, **_):
    return [
        len(p) + len(c[0]["content"]) + sum(i) + trainer_state.global_step
        for p, c, i in zip(prompts, completions, completion_ids)
    ]
"""
LIMIT_S = 1.5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "hangs_here.py").write_text(HANGS)
    return tmp_path / "hangs_here.py"


def group(index: int, *texts: str, **fields: Any) -> Group:
    completions = tuple(
        Completion(np.array([1, 2], np.int32), np.zeros(2, np.float32), np.array([7, 8], np.int32), t, "stop")
        for t in texts
    )
    return Group(index, Prompt(str(index), "p", np.zeros(1, np.int32), "t", {}, **fields), completions)


def reward(file: Path, name: str) -> FunctionReward:
    return FunctionReward(kind="function", name="mine", function=f"{file}:{name}", timeout_s=LIMIT_S)


@pytest.mark.long
def test_other_groups_are_scored_while_one_hangs(file: Path) -> None:
    from frpo.actors.reward import RewardWorker

    async def run() -> None:
        worker = RewardWorker((reward(file, "grade"),), "weighted")
        await worker.ping()
        began = time.monotonic()
        stuck = asyncio.create_task(worker.score(group(0, "a", "bb", "bad", "dddd")))
        others = await asyncio.gather(*(worker.score(group(i, "x", "yy")) for i in range(1, 9)))
        assert [[r.total for r in rewards] for rewards in others] == [[1.0, 2.0]] * 8
        assert time.monotonic() - began < LIMIT_S
        assert [r.total for r in await stuck] == [1.0, 2.0, None, 4.0]
        worker.scorer.close()

    asyncio.run(run())


@pytest.mark.long
def test_a_function_gets_the_conversation_the_tokens_and_the_step(file: Path) -> None:
    from frpo.actors.reward import RewardWorker

    talk = tuple({"role": "user" if i % 2 == 0 else "assistant", "content": "x"} for i in range(3))
    worker = RewardWorker((reward(file, "chat"),), "weighted")
    rewards = asyncio.run(worker.score(group(0, "abcd", messages=talk, conversational=True)))
    assert [(r.total, r.error) for r in rewards] == [(3 + 4 + 3 + 7, None)]
    worker.scorer.close()


@pytest.mark.long
def test_in_a_replica_the_other_callers_are_answered(file: Path) -> None:
    from frpo.deploy.service import RewardReplica

    async def run() -> None:
        replica = RewardReplica(reward(file, "grade"), ReplicaConfig())
        began = time.monotonic()
        stuck = asyncio.create_task(replica.score([Item("p", "bad", "t", {}), Item("p", "ok", "t", {})]))
        others = await asyncio.gather(*(replica.score([Item("p", "x" * i, "t", {})]) for i in range(63)))
        assert others == [[(float(i), None)] for i in range(63)]
        assert time.monotonic() - began < LIMIT_S
        assert await stuck == [
            (None, f"took longer than {LIMIT_S:g} s (rewards.mine.timeout_s)"),
            (2.0, None),
        ]
        replica.one.close()

    asyncio.run(run())
