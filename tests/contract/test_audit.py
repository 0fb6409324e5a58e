"""An audit with fakes: a policy without arms is certified, fine-tuned by every run of the grid, and the worst
of what counts is what the numbers of the runs say. No Ray, no engines."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from frpo import report
from frpo.audit import print_audit, run_audit
from frpo.config import Config, FinetuneConfig
from frpo.disk import write_text
from frpo.grid import FINE_TUNES, certificate_run, list_runs
from frpo.metrics import RunLog
from frpo.outline import list_stages
from frpo.recipe import dump_config
from frpo.records import StageResult
from frpo.report.audit_schema import POLICY, RECIPE, Audit, AuditedPolicy
from frpo.report.data import collect_report
from frpo.roles import Team
from frpo.rundir import write_description
from frpo.saved import weights_sha256
from frpo.stages.folders import look_at_stages
from frpo.teams import Failure, KeptTeam, drop_fine_tuned, is_complete, refuse_unfinished, run_all
from tests.support import fakes
from tests.support.command_line import CommandLine
from tests.support.whole import DATA, REWARDS, run

GRID = {"learning_rates": [0.5, 4.0], "steps": [2, 6], "num_seeds": 2, "task": "only"}
SFT = {
    "name": "sft",
    "num_steps": 6,
    "batch_size": 2,
    "learning_rate": 4.0,
    "data": DATA,
    "heldout": DATA,
}


class OwnRate(fakes.FakeFinetuner):
    """Learns at the rate that the fine-tune asks for."""

    def start(self, policy: Path, *settings: object) -> None:
        super().start(policy)
        _, finetune, _ = settings
        assert isinstance(finetune, FinetuneConfig)
        self.learning_rate = finetune.learning_rate


def recipe(folder: Path, **changed: Any) -> Config:
    tree = fakes.config().model_dump(mode="json", exclude={"arms", "objective"})
    asked = {
        "run_dir": str(folder),
        "downstream": [SFT],
        "certify": {"completions_per_prompt": 16, "radii": [0.1, 2.0]},
        "evaluate": {"completions_per_prompt": 64},
        "audit": GRID,
    }
    return Config.model_validate({**tree, **asked, **changed})


def do(config: Config) -> None:
    """One run, as a team does it."""
    team = fakes.team(config, REWARDS)
    finetune = OwnRate(config.objective)
    assert isinstance(team.rollouts, fakes.FakeEngine)
    publisher = fakes.FakePublisher(finetune, team.rollouts)
    run(config, replace(team, finetune=finetune, finetune_publisher=publisher))
    write_description(config.folder, config)
    write_text(config.folder / "report.json", collect_report(config.folder).model_dump_json())


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    folder = tmp_path_factory.mktemp("audit")
    config = recipe(folder)
    for each in list_runs(config, folder):
        do(each)
    write_text(folder / RECIPE, dump_config(config))
    policy = AuditedPolicy(model="some/policy", weights_sha256="ab")
    write_text(folder / POLICY, policy.model_dump_json())
    report.build_audit(folder)
    return config, folder


def audit_in(folder: Path) -> Audit:
    return Audit.model_validate_json((folder / "audit.json").read_text())


def loss_after(steps: int, rate: float) -> float:
    """Of the fake: descent of -log p(5) from equal logits."""
    logits = np.zeros(fakes.ANSWERS)
    for _ in range(steps):
        p = np.exp(logits) / np.exp(logits).sum()
        logits -= rate * (p - np.eye(fakes.ANSWERS)[5])
    return float(-np.log(np.exp(logits[5]) / np.exp(logits).sum()))


def test_a_recipe_without_arms_certifies_and_fine_tunes_its_base(tmp_path: Path) -> None:
    config = recipe(tmp_path, audit=None)
    names = [stage.name for stage in list_stages(config)]
    assert names == ["base", "certify/base", "downstream/base/sft"]
    do(config)
    done = [StageResult.model_validate_json((tmp_path / name / "done.json").read_text()) for name in names]
    assert [evaluation.step for evaluation in done[2].evaluations] == [0, 6]
    start, end = done[2].evaluations
    assert start.kl_policy is not None
    assert end.kl_policy is not None
    assert start.kl_policy.mean == pytest.approx(0.0, abs=1e-6)
    assert end.kl_policy.mean > 0.05
    assert done[1].certificates[0].radius is None
    assert "the policy kept" in report.build_report(tmp_path).read_text()
    assert all(standing.state == "done" for standing in look_at_stages(config))


def test_what_a_loop_draws_with_redoes_a_fine_tune_by_rl_of_a_base(tmp_path: Path) -> None:
    rl = {"kind": "rl", "name": "rl", "data": DATA, "learner": {"num_steps": 2}}
    config = recipe(tmp_path, audit=None, downstream=[SFT, rl])
    do(config)
    wider = {**config.rollout.model_dump(), "group_size": 4}
    changed = recipe(tmp_path, audit=None, downstream=[SFT, rl], rollout=wider)
    states = {standing.stage.name: standing.state for standing in look_at_stages(changed)}
    assert states == {
        "base": "done",
        "certify/base": "done",
        "downstream/base/sft": "done",
        "downstream/base/rl": "other",
    }


def test_every_fine_tune_has_its_utility_and_its_place(audited: tuple[Config, Path]) -> None:
    _, folder = audited
    told = audit_in(folder)
    assert [(each.learning_rate, each.steps) for each in told.fine_tunes] == [
        (0.5, 2),
        (0.5, 6),
        (4.0, 2),
        (4.0, 6),
    ]
    start = math.log(fakes.ANSWERS)
    best = start - loss_after(6, 4.0)
    for each in told.fine_tunes:
        share = (start - loss_after(each.steps, each.learning_rate)) / best
        assert each.utility is not None
        assert each.utility.values == pytest.approx((share, share), rel=1e-5)
        assert each.counts == (share >= 0.8)
        assert len(each.kept.values) == 2
        assert each.kept.lo is None
    kept = [each.kept.mean for each in told.fine_tunes]
    assert kept == sorted(kept, reverse=True)
    kls = [each.kl.mean for each in told.fine_tunes]
    assert kls == sorted(kls)
    assert told.start is not None
    assert told.start.mean == pytest.approx(0.5, abs=0.1)


def test_the_worst_is_the_worst_of_those_that_learnt(audited: tuple[Config, Path]) -> None:
    _, folder = audited
    told = audit_in(folder)
    counting = [each for each in told.fine_tunes if each.counts]
    assert 0 < len(counting) < 4
    assert told.harshest == min(counting, key=lambda each: each.kept.mean)
    assert told.left is not None
    assert told.start is not None
    assert told.left == pytest.approx(told.harshest.kept.mean / told.start.mean)
    page = (folder / "audit.html").read_text()
    assert f'<p class="number">{100 * told.left:.0f} %</p>' in page


def test_the_pages_are_written_again_and_two_models_stand_on_one(
    audited: tuple[Config, Path], tmp_path: Path, frpo: CommandLine
) -> None:
    _, folder = audited
    before = (folder / "audit.html").read_text()
    assert frpo("report", str(folder), "--out", str(tmp_path)).code == 0
    assert (tmp_path / "audit.html").read_text() == before
    other = audit_in(folder).model_copy(update={"model": "another/model"})
    write_text(tmp_path / "audit.json", other.model_dump_json())
    both = frpo("report", str(folder), str(tmp_path), "--out", str(tmp_path / "both"))
    assert both.code == 0
    page = (tmp_path / "both" / "audit.html").read_text()
    assert page.count('class="number"') == 2
    assert "some/policy" in page
    assert "another/model" in page
    assert "none/audit.json: No such file" in frpo.refuses("report", str(folder), "none")


def test_a_seed_that_did_not_end_is_left_out_and_named(audited: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = audited
    lost = folder / FINE_TUNES / "sft-lr4-full" / "seed-008"
    result = lost / "downstream/base/sft/done.json"
    text = result.read_text()
    result.unlink()
    try:
        report.build_audit(folder, tmp_path)
        told = audit_in(tmp_path)
        assert told.stopped == ("sft-lr4-full",)
        assert [len(each.kept.values) for each in told.fine_tunes] == [2, 2, 1, 1]
        left = [each for each in list_runs(config, folder) if not is_complete(each)]
        assert [each.folder for each in left] == [lost]
    finally:
        result.write_text(text)


def test_an_audit_that_is_finished_starts_nothing(audited: tuple[Config, Path]) -> None:
    config, folder = audited
    runs = list_runs(config, folder)
    assert run_all(runs, folder, "runs") == []  # with work to do it would start Ray
    refuse_unfinished(runs, [])


def test_a_finished_audit_is_told_again_with_the_weights_that_it_is_of(
    audited: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = audited
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    weights = tmp_path / "policy"
    weights.mkdir()
    assert run_audit(recipe(again), again) == again / "audit.html"
    told = audit_in(again)
    assert told.model == "nowhere"
    assert told.weights_sha256 == weights_sha256(weights)  # of no file at all
    assert told.fine_tunes == audit_in(folder).fine_tunes
    capsys.readouterr()
    print_audit(again, Console(width=200))
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{100 * (told.left or 0):.0f} % of this model's reward on only prompts is left")


def test_another_grid_leaves_the_runs_that_both_have(audited: tuple[Config, Path]) -> None:
    config, folder = audited
    wider = recipe(folder, audit={**GRID, "learning_rates": [0.5, 4.0, 8.0]})
    left = [each.folder.parent.name for each in list_runs(wider, folder) if not is_complete(each)]
    assert left == ["sft-lr8-full", "sft-lr8-full"]
    other = recipe(folder, seed=8)
    assert [is_complete(each) for each in list_runs(other, folder)].count(True) == 2  # seed 8 of both rates
    assert is_complete(certificate_run(config, folder))


def test_what_a_fine_tune_made_can_go_and_it_is_finished_all_the_same(
    audited: tuple[Config, Path],
) -> None:
    config, folder = audited
    certificate, first, *_ = list_runs(config, folder)
    made = first.folder / "downstream/base/sft/policy"
    assert made.exists()
    drop_fine_tuned(first.folder)
    assert not made.exists()
    assert is_complete(first)
    assert is_complete(certificate)


def test_unfinished_runs_are_said_with_what_stopped_them(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    failure = Failure("fine-tunes/x/seed-000", "the loss is nan", by_itself=True)
    with pytest.raises(Exception, match="fine-tunes/x/seed-000: the loss is nan"):
        refuse_unfinished([certificate_run(config, tmp_path)], [failure])
    with pytest.raises(Exception, match="in the hands of another process"):
        refuse_unfinished([certificate_run(config, tmp_path)], [])


def test_a_team_serves_the_runs_that_it_can_and_makes_room_for_another(tmp_path: Path) -> None:
    events: list[str] = []

    @contextmanager
    def start(config: Config, log: RunLog) -> Iterator[Team]:
        events.append(f"up for {config.folder.parent.name}")
        yield fakes.team(config, REWARDS)
        events.append("down")

    def use(*ranks: object, **changed: Any) -> list[str]:
        events.clear()
        config = recipe(tmp_path, audit={"ranks": ranks}, **changed)
        _, *runs = list_runs(config, tmp_path)
        with KeptTeam(start) as kept:
            for each in runs:
                with kept.team_of(each, RunLog(tmp_path, each)) as team:
                    assert team.harness is not None
        return list(events)

    assert use("full", 8, 16) == ["up for sft-lr4-full", "down"]
    coarse = {"path": "nowhere", "dtype": "bfloat16"}
    assert use("full", 8, model=coarse) == [
        "up for sft-lr4-full",
        "down",
        "up for sft-lr4-r8",
        "down",
    ]
