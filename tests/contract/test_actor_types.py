"""mypy sees through the boundary of a process: what is wrong with a call of an actor is wrong where it
stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CALLS = """
from pathlib import Path
from typing import Any, assert_type

from frpo.actors._calls import Actors, RemoteCall, put_once
from frpo.actors._train import TrainWorker
from frpo.actors.finetune import FinetuneWorker
from frpo.actors.learner import LearnerPool, LearnerWorker
from frpo.actors.reward import RewardWorker
from frpo.actors.rollout import RolloutWorker
from frpo.stats import UpdateStats
from frpo.types import Group, Reward, RolloutBatch, Sequences


def right(
    ranks: Actors[LearnerWorker], rewards: Actors[RewardWorker], batch: RolloutBatch, group: Group
) -> None:
    assert_type(ranks.call(0, LearnerWorker.update, batch), RemoteCall[UpdateStats])
    assert_type(ranks.call_all(LearnerWorker.update, put_once(batch)), list[UpdateStats])
    assert_type(ranks.call(0, TrainWorker.address).result(), tuple[str, int])
    assert_type(ranks.call(0, TrainWorker.export, folder="there", merged=True), RemoteCall[None])
    assert_type(rewards.call_async(0, RewardWorker.score, group), RemoteCall[tuple[Reward, ...]])


def wrong(ranks: Actors[LearnerWorker], rollouts: Actors[RolloutWorker], sequences: Sequences) -> None:
    ranks.call(0, LearnerWorker.updaet, sequences)  # E: "type[LearnerWorker]" has no attribute "updaet"
    ranks.call(0, FinetuneWorker.update, sequences)  # E: expected "Callable[[LearnerWorker, Sequences,
    ranks.call(0, LearnerWorker.export, "there")  # E: Missing positional argument "merged"
    ranks.call(0, LearnerWorker.ping, "there")  # E: Too many arguments for "call"
    ranks.call(0, LearnerWorker.export, Path("there"), True)  # E: type "Path"; expected "str"
    ranks.call_all(LearnerWorker.update, put_once(sequences))  # E: expected "RolloutBatch"
    ranks.call(0, LearnerWorker.export, "there", merge=True)  # E: Unexpected keyword
    batch: RolloutBatch = ranks.call(0, LearnerWorker.logprobs, sequences).result()  # E: variable
    rollouts.stream(0, RolloutWorker.logprobs, sequences)  # E: Sequences], AsyncIterator[
    LearnerPool([RolloutWorker], timeout_s=1)  # E: List item 0 has incompatible type "type[RolloutWorker]"
"""


@pytest.mark.long
def test_a_wrong_call_of_an_actor_is_an_error_where_it_stands(tmp_path: Path) -> None:
    snippet = tmp_path / "calls.py"
    snippet.write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--hide-error-context", "--no-pretty", str(snippet)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250).stdout
    errors = dict(re.findall(r"calls\.py:(\d+): error: (.*)", said))
    expected = {
        str(number): line.partition("  # E: ")[2]
        for number, line in enumerate(CALLS.splitlines(), 1)
        if "  # E: " in line
    }
    assert errors.keys() == expected.keys(), said
    for number, words in expected.items():
        assert words in errors[number]
