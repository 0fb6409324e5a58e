"""What `frpo chaos` reads from a run's folder, and what it says of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from frpo import chaos
from frpo.chaos import Chaos, ChaosPlan, Kill, Round, Watched
from frpo.config import Config, ConfigError
from frpo.raylets import Raylets
from frpo.roles import WorkerFailed
from frpo.rows import append_rows
from tests.support import fakes

LOG = """2026-11-28 15:00:01,250 rlhf/arm step 3/30: reward 0.5
2026-11-28 15:00:02,500 rollout worker 0 was killed during logprobs(); waiting until it is back
2026-11-28 15:00:09,000 rlhf/arm: learner worker 1 died during update(): The actor died
All its ranks are started anew.
"""


@pytest.fixture
def config() -> Config:
    tree = fakes.config(beta=0.0).model_dump(mode="json", exclude={"arms"})
    data = [{"path": "nowhere.jsonl", "task": "only"}]
    base = {"num_steps": 2, "batch_size": 2, "data": data}
    return Config.model_validate(
        {**tree, "base": base, "learner": {"num_steps": 3}, "arms": [{"name": "arm"}]}
    )


def write_steps(folder: Path, stage: str, *steps: int, kind: str = "step") -> None:
    rows: list[dict[str, Any]] = [{"kind": kind, "stage": stage, "step": step} for step in steps]
    append_rows(folder, "metrics.jsonl", rows)


def finish(folder: Path, stage: str) -> None:
    (folder / stage).mkdir(parents=True, exist_ok=True)
    (folder / stage / "done.json").write_text("{}")


def test_a_run_is_as_far_as_its_last_step_or_finished_stage(tmp_path: Path, config: Config) -> None:
    watched = Watched(config, tmp_path)
    assert watched.position() == (-1, 0, "the start")
    write_steps(tmp_path, "base", 1, 2, kind="finetune")
    assert watched.position() == (0, 2, "base")
    before = watched.position()
    finish(tmp_path, "base")
    assert watched.position() > before
    write_steps(tmp_path, "rlhf/arm", 1)
    append_rows(tmp_path, "metrics.jsonl", [{"kind": "validation", "stage": "rlhf/arm", "step": 9}])
    assert watched.position() == (1, 1, "rlhf/arm")


def test_it_is_noticed_when_the_runs_log_says_so_first_after_the_kill(tmp_path: Path, config: Config) -> None:
    (tmp_path / "run.log").write_text(LOG)
    watched = Watched(config, tmp_path)
    killed = chaos.datetime(2026, 11, 28, 15, 0, 2).timestamp()
    assert watched.noticed(killed) == pytest.approx(0.5)
    assert watched.noticed(killed + 2) == pytest.approx(5.0)
    assert watched.noticed(killed + 60) is None


def test_a_run_that_does_nothing_is_named_after_the_limit(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "LIMIT_S", 0.2)
    hung: Any = SimpleNamespace(is_over=False)
    with pytest.raises(WorkerFailed, match=r"did nothing for 0\.2 s"):
        Watched(config, tmp_path).longest_pause(hung)
    over: Any = SimpleNamespace(is_over=True)
    assert Watched(config, tmp_path).longest_pause(over) == 0.0


def test_a_pause_lasts_until_a_step_that_was_never_done_before(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 3 are done; from the kill on: step 4 after 1 s, at 3 s back to 2, step 4 again at 12 s, step
    5 at 13 s, 6 at 16 s."""
    clock = [0.0]
    positions = {0: 3, 1: 4, 3: 2, 12: 4, 13: 5, 16: 6}
    watched = Watched(config, tmp_path)

    def position() -> tuple[int, int, str]:
        return 1, positions[max(at for at in positions if at <= clock[0])], "rlhf/arm"

    monkeypatch.setattr(watched, "position", position)
    monkeypatch.setattr(chaos.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(chaos.time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 0.5))
    run: Any = SimpleNamespace(is_over=False)
    assert watched.longest_pause(run, settle_s=15.0) == 12.0
    assert clock[0] == 16.0


@pytest.mark.parametrize(("steps", "whole"), [((1, 2, 3), True), ((1, 2), False), ((1, 2, 2, 3), False)])
def test_a_run_is_whole_when_every_step_stands_once(
    tmp_path: Path, config: Config, steps: tuple[int, ...], whole: bool
) -> None:
    write_steps(tmp_path, "base", 1, 2, kind="finetune")
    write_steps(tmp_path, "rlhf/arm", *steps)
    assert chaos.is_whole(config, tmp_path) is whole


def test_a_run_that_may_stop_at_a_reward_is_whole_without_a_gap(tmp_path: Path, config: Config) -> None:
    (arm,) = config.arms
    early = arm.model_copy(update={"learner": arm.learner.model_copy(update={"stop_at_reward": 0.5})})
    config = config.model_copy(update={"arms": (early,)})
    write_steps(tmp_path, "base", 1, 2, kind="finetune")
    assert not chaos.is_whole(config, tmp_path)
    write_steps(tmp_path, "rlhf/arm", 1, 2)
    assert chaos.is_whole(config, tmp_path)
    write_steps(tmp_path, "rlhf/arm", 4)
    assert not chaos.is_whole(config, tmp_path)


def test_the_weights_of_every_stage_are_compared(tmp_path: Path, config: Config) -> None:
    for folder, weights in (("one", "a"), ("other", "b")):
        for stage, content in (("base", weights), ("rlhf/arm", "the same")):
            (tmp_path / folder / stage / "policy").mkdir(parents=True)
            (tmp_path / folder / stage / "policy" / "model.safetensors").write_text(content)
    one, other = (chaos.digests_of(config, tmp_path / folder) for folder in ("one", "other"))
    assert {name: one[name] == other[name] for name in one} == {"base": False, "rlhf/arm": True}


def test_actors_are_found_by_the_names_of_their_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["round-000 rollout 0", "round-000 rollout 1", "round-000 learner 0", "other rollout 0", "x"]
    actors = [{"name": name, "namespace": "group"} for name in names]
    monkeypatch.setattr(chaos.ray.util, "list_named_actors", lambda all_namespaces: actors)
    found = chaos.find_actors(Path("runs/round-000"))
    assert {role: [victim.name for victim in victims] for role, victims in found.items()} == {
        "rollout": ["round-000 rollout 0", "round-000 rollout 1"],
        "learner": ["round-000 learner 0"],
    }


def test_the_actors_of_a_run_stand_apart_where_nodes_are_killed(tmp_path: Path) -> None:
    plan = ChaosPlan(Path("r.yaml"), ("seed=3",), tmp_path, kills=5, seed=0, target="nodes")
    command = chaos.Run(plan, tmp_path / "round-000", "127.0.0.1:6379").command
    assert command[-6:] == [
        "--set",
        "cluster.strategy=SPREAD",
        "--set",
        "seed=3",
        "--set",
        "cluster.max_restarts=8",
    ]
    alone = chaos.Run(replace(plan, target="actors"), tmp_path / "round-000", "127.0.0.1:6379").command
    assert "cluster.strategy=SPREAD" not in alone


def test_nodes_of_a_cluster_that_is_not_ours_are_not_killed(config: Config) -> None:
    theirs = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"address": "10.0.0.1:6379"})}
    )
    refused = pytest.raises(
        ConfigError, match=r"cluster\.address: 10\.0\.0\.1:6379: nodes are killed in a cluster of"
    )
    with refused, chaos.open_cluster(theirs, "nodes"):
        pass


def test_a_killed_node_is_replaced_by_another() -> None:
    """With the CPUs it had, so that the whole plan finds room again."""
    made = FakeCluster()
    raylets = Raylets(made, {"num_cpus": 3})
    raylets.replace_one(random.Random(0))
    raylets.replace_one(random.Random(1))
    assert made.added == [3] * 5
    assert len(made.alive) == 3
    assert raylets.address == "127.0.0.1:1"


class FakeCluster:
    """ray.cluster_utils.Cluster, as far as nodes come and go."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self.added: list[int] = []
        self.alive: set[int] = set()

    def add_node(self, num_cpus: int) -> int:
        self.added.append(num_cpus)
        self.alive.add(len(self.added))
        return len(self.added)

    def remove_node(self, node: int, allow_graceful: bool) -> None:
        assert not allow_graceful
        self.alive.remove(node)


def test_the_table_has_the_median_and_the_largest_of_each_role() -> None:
    kills = [
        Kill(role="rollout", stage="rlhf/arm", step=step, noticed_s=noticed, pause_s=pause)
        for step, noticed, pause in ((1, 0.5, 20.0), (2, None, 1.0), (3, 2.5, 30.0))
    ]
    rounds = (
        Round(folder="round-000", kills=2, same_weights=True, whole=True),
        Round(folder="round-001", kills=1, same_weights=False, whole=True),
    )
    console = Console(record=True, width=120)
    chaos.print_chaos(Chaos(recipe="r.yaml", seed=0, kills=tuple(kills), rounds=rounds), console)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "rollout" in line)
    assert [cell.strip() for cell in row.strip("│┃ ").split("│")] == [
        "rollout",
        "3",
        "2",
        "2.5",
        "2.5",
        "20.0",
        "30.0",
    ]
    assert "2 runs came to their end: 2 with every step once; 1 of 2 compared" in " ".join(text.split())
