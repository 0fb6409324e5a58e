"""The report of a small made-up run: its numbers, its words, its schema, and that the page is
self-contained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tables import write_tables
from frpo import report
from frpo.certificate import reward_lower_bound, worst_case_reward
from frpo.config import (
    CertifyConfig,
    ConfigError,
    FrpoEstimator,
    GrpoEstimator,
    ObjectiveConfig,
    RlooEstimator,
)
from frpo.evaluation import make_certificate
from frpo.metrics import RunLog
from frpo.recipe import dump_config, load_recipe
from frpo.records import (
    ArmSummary,
    BenchmarkScore,
    Estimate,
    Evaluation,
    Interpolation,
    Sample,
    StageResult,
)
from frpo.report.arms import settings_of
from frpo.report.data import collect_report
from frpo.report.drawing import colour_of, line_of, marker_of, share_styles
from frpo.report.frontier import describe_defence
from frpo.report.headline import of_reward
from frpo.report.page import render_run
from frpo.report.plots import draw_training, limits_of
from frpo.report.schema import Report, TrainingCurves
from frpo.report.sweep import gather_sweep
from frpo.report.tables import tabulate_kept, tabulate_others
from frpo.types import Reward
from tests.support.builders import evaluation_of, measured_task, metrics

ROOT = Path(__file__).parents[2]
KEPT = {"grpo": 0.5, "frpo": 0.64, "grpo-reverse": 0.7, "frpo-reverse": 0.9}


SPREAD = {"frpo": 0.15}
"""Of the four prompts' rewards around their mean."""


def evaluation(arm: str, harmful: float, step: int = 0, downstream: str | None = None) -> Evaluation:
    rewards = [
        measured_task(
            t,
            m,
            parts={"answer": m},
            num_prompts=36,
            num_completions=576,
            per_prompt=tuple(m + sign * SPREAD.get(arm, 0.1) for sign in (1, -1, 1, -1)),
        )
        for t, m in (("downstream", 0.3 + step / 400), ("harmful", harmful), ("harmless", 0.8))
    ]
    return evaluation_of(
        arm,
        *rewards,
        downstream=downstream,
        step=step,
        kl_reference=Estimate(mean=0.5 + step / 100, se=0.01) if arm != "base" else None,
        kl_policy=Estimate(mean=step / 100, se=0.01) if downstream else None,
        downstream_loss=2 - step / 200 if downstream else None,
        samples=(
            Sample(
                task="harmful",
                prompt="how do i <b>break</b> it",
                completion=f"said by {arm} {step}",
                reward=1.0,
            ),
        ),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = load_recipe(ROOT / "recipes" / "testbed.yaml")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "versions.json").write_text('{"python": "3.11", "ray": "2.60.0"}')

    def write(stage: str, evaluations: list[Evaluation], arm: ArmSummary | None = None) -> None:
        folder = tmp_path / stage
        folder.mkdir(parents=True)
        result = StageResult(
            stage=stage, inputs="0" * 64, seconds=12.0, evaluations=tuple(evaluations), arm=arm
        )
        (folder / "done.json").write_text(result.model_dump_json())

    write("base", [evaluation("base", 0.6)])
    with RunLog(tmp_path, config) as log:
        for name, kept in KEPT.items():
            log.begin(f"rlhf/{name}", 6)
            for step in range(1, 7):
                tasks = {"harmful": 0.5, "harmless": 0.5}
                log.step(f"rlhf/{name}", metrics(step, reward=step / 10, reward_tasks=tasks))
            phases = {"generate": 1.0, "score": 0.5, "update": 1.0, "publish": 0.2, "other": 0.3}
            summary = ArmSummary(
                arm=name,
                num_steps=6,
                num_prompts=144,
                num_completions=1152,
                num_tokens=5760,
                failed_rewards=0,
                seconds=3.0,
                phase_seconds=phases,
                weights_sha256="ab",
            )
            write(f"rlhf/{name}", [evaluation(name, 0.95)], summary)
            for task, end in (("crafts-gentle", 0.95 - (0.95 - kept) / 4), ("crafts-harsh", kept)):
                marks = [evaluation(name, 0.95 + (end - 0.95) * s / 200, s, task) for s in (0, 25, 100, 200)]
                write(f"downstream/{name}/{task}", marks)
    return tmp_path


@pytest.mark.long
def test_the_zero_line_is_what_a_policy_is_away_from_itself(run: Path) -> None:
    assert collect_report(run).zero_line == 0.0
    file = next(run.glob("downstream/*/*/done.json"))
    result = StageResult.model_validate_json(file.read_text())
    first = result.evaluations[0].model_copy(update={"kl_policy": Estimate(mean=-0.031, se=0.01)})
    file.write_text(
        result.model_copy(update={"evaluations": (first, *result.evaluations[1:])}).model_dump_json()
    )
    assert collect_report(run).zero_line == 0.031
    assert "is 0.031 nats away at most" in report.build_report(run).read_text()


def test_the_page_says_what_to_ship_and_compares_like_with_like(run: Path) -> None:
    collected = collect_report(run)
    assert collected.focus == "harmful"
    verdict = collected.verdict
    assert verdict is not None
    assert (verdict.decision, verdict.arm) == ("ship", "frpo-reverse")
    assert verdict.why[0] == (
        "After crafts-harsh, the fine-tune that costs most, frpo-reverse keeps 0.90 of 0.95 reward on "
        "harmful prompts; the others keep: grpo 0.50, frpo 0.64, grpo-reverse 0.70."
    )
    assert verdict.policy == str(run / "rlhf" / "frpo-reverse" / "policy")
    assert len(verdict.load.splitlines()) == 3
    assert collected.reward == (
        "Reward is what “answer” gives a completion, more is better; the base policy has 0.60 on harmful "
        "prompts, 0.80 on harmless prompts."
    )
    assert collected.headline[:2] == (
        "Under one kind of penalty, frpo against grpo: +0.14 [+0.05, +0.23] on harmful prompts after "
        "crafts-harsh; on harmless prompts +0.00 [-0.09, +0.09] before it and +0.00 [-0.09, +0.09] after it. "
        "They stood 0.50 and 0.50 nats from the reference.",
        "Under one kind of penalty, frpo-reverse against grpo-reverse: +0.20 [+0.20, +0.20] on harmful "
        "prompts after crafts-harsh; on harmless prompts +0.00 [+0.00, +0.00] before it and +0.00 [+0.00, "
        "+0.00] after it. They stood 0.50 and 0.50 nats from the reference.",
    )
    assert "one seed cannot prove" in collected.headline[-1]
    (harsh,) = [c for c in collected.comparisons if (c.a, c.downstream) == ("frpo", "crafts-harsh")]
    half = 3.182446 * (0.15 - 0.10) * (4 / 3) ** 0.5 / 2  # paired: what both arms share of a prompt is gone
    assert (harsh.gained.mean, harsh.gained.half) == pytest.approx((0.14, half))
    assert collected.arms[1].settings == "FRPO λ 0.5, β 0.3 k3"
    page = report.build_report(run).read_text()
    assert report.read_verdict(run) == f"Ship: frpo-reverse ({verdict.policy}). {verdict.why[0]}"
    assert f"AutoModelForCausalLM.from_pretrained(&#34;{run}/rlhf/frpo-reverse/policy&#34;)" in page
    words = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"ship\s+frpo-reverse", words)


def test_a_run_of_which_a_fine_tune_is_left_ships_nothing_yet(run: Path) -> None:
    for arm in KEPT:
        shutil.rmtree(run / "downstream" / arm / "crafts-harsh")
    verdict = collect_report(run).verdict
    assert verdict is not None
    assert verdict.decision == "can't tell"
    (lasts,) = [rule for rule in verdict.judged[0].rules if rule.name == "lasts"]
    assert (lasts.holds, lasts.figures) == (None, "1 of 2 fine-tunes are measured")


def test_the_reward_in_words_names_the_parts_that_count() -> None:
    parts = [{"name": "answer"}, {"name": "short", "weight": 0.5}, {"name": "refuses", "weight": 0.0}]
    assert of_reward(parts, "weighted", None, ["harmful"]) == (
        "Reward is what “answer” + 0.5 x “short” give a completion, more is better."
    )
    parts = [{"name": "declines", "tasks": ["harmful"]}, {"name": "answers", "tasks": ["sums", "facts"]}]
    assert of_reward(parts, "product", None, []) == (
        "Reward is the product of what “declines” (harmful prompts) and “answers” (sums and facts prompts) "
        "give a completion, more is better."
    )
    assert of_reward(parts[:1], "mean", None, []).startswith(
        "Reward is what “declines” (harmful prompts) gives"
    )


def test_arms_of_unlike_penalties_are_compared_in_the_records_alone(run: Path) -> None:
    collected = collect_report(run)
    pairs = {(c.a, c.b): c.alike for c in collected.comparisons}
    assert pairs == {
        ("frpo", "grpo"): True,
        ("grpo-reverse", "grpo"): False,
        ("frpo-reverse", "grpo-reverse"): True,
    }


def test_held_out_prompts_that_were_trained_on_are_told_as_last_counted(run: Path) -> None:
    for shared in (2, 0, 3):
        with RunLog(run, load_recipe(ROOT / "recipes" / "testbed.yaml")) as log:
            log.data({"shared": shared, "heldout": 8})
        words = " ".join(collect_report(run).headline)
        assert words.count("of 8 held-out prompts are training prompts too") == (shared > 0)
        assert (f"{shared} of 8 held-out" in words) == (shared > 0)


def test_the_page_is_one_file_made_from_report_json(run: Path) -> None:
    page = report.build_report(run).read_text()
    assert json.loads((run / "report.json").read_text())["focus"] == "harmful"
    outside = re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)', page)
    assert outside == []
    panels = 2 * 2 + 2 + 1 + 4  # downstream, distance, frontier, training
    assert page.count("<svg") == panels + 1  # and the timeline
    assert "frpo, step 25: 0.91 ± 0.04" in page  # what a point says
    assert page.count('class="a1"') > panels
    scripts = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    assert page.count("</script>") == len(scripts) == 4
    assert ["computePosition" in script for script in scripts] == [True, True, True, False]
    assert page.index('<div id="tip" hidden>') < page.index("<script>")
    assert "main:has(#show-3:not(:checked)) .a3 { display:none }" in page
    assert "Steps 1 to 6 of grpo, two bars each" in page
    assert "25 % of the groups were there when their step began" in page
    assert "The learner updated 33 % of the time, groups were being drawn 48 % of it" in page
    assert "how do i &lt;b&gt;break&lt;/b&gt; it" in page  # what a model says is text, never markup
    assert "said by frpo 200" in page
    assert "0.64 ± 0.04" in page
    assert len(page) < 1_000_000
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_arms_stand_side_by_side_four_at_a_time(run: Path) -> None:
    collected = collect_report(run)
    (kept,) = tabulate_kept(collected)
    assert (kept.title, kept.arms) == ("Reward on harmful prompts after each fine-tune", (0, 1, 2, 3))
    assert kept.rows["crafts-harsh"] == ("0.50 ± 0.04", "0.64 ± 0.04", "0.70 ± 0.04", "0.90 ± 0.04")
    assert list(kept.rows) == ["crafts-gentle", "crafts-harsh"]
    more = collected.model_copy(update={"arms": (*collected.arms, *collected.arms[:2])})
    assert [(table.arms, len(table.rows["crafts-harsh"])) for table in tabulate_kept(more)] == [
        ((0, 1, 2, 3), 4),
        ((4, 5), 2),
    ]
    others = {table.title: table.rows["crafts-gentle"][1] for table in tabulate_others(collected)}
    assert others == {
        "Reward on downstream prompts, before → after": "0.30 → 0.80 ± 0.04",
        "Reward on harmless prompts, before → after": "0.80 → 0.80 ± 0.04",
        "KL to the reference, nats": "2.50 ± 0.02",
        "KL from the arm's policy, nats": "2.00 ± 0.02",
        "Loss on held-out examples, before → after, nats per token": "2.000 → 1.000",
    }


def test_a_fine_tune_that_is_left_is_a_dash(run: Path) -> None:
    shutil.rmtree(run / "downstream" / "grpo" / "crafts-harsh")
    (kept,) = tabulate_kept(collect_report(run))
    assert kept.rows["crafts-harsh"][:2] == ("–", "0.64 ± 0.04")


@pytest.mark.long
def test_a_page_of_four_arms_and_eleven_fine_tunes_is_light(run: Path) -> None:
    collected = collect_report(run)
    names = [f"crafts-{i}" for i in range(11)]
    downstream = []
    for one, name in itertools.product(collected.downstream[::2], names):
        downstream.append(one.model_copy(update={"task": name}))
    arms = []
    for arm in collected.arms:
        kept = [arm.kept[i % 2].model_copy(update={"downstream": name}) for i, name in enumerate(names)]
        arms.append(arm.model_copy(update={"kept": tuple(kept)}))
    report = collected.model_copy(update={"arms": tuple(arms), "downstream": tuple(downstream)})
    page = render_run(report)
    assert page.count("<svg") == 2 * 11 + 2 + 1 + 4 + 1
    assert len(page) < 500_000


def test_a_style_that_several_marks_have_is_a_class() -> None:
    page = (
        "<style>p { }</style><i style='left:0'></i>"
        '<path d="M 0 0" style="fill:none"/><use x="1" style="fill:none"/><text style="x:1" x="2">2</text>'
    )
    assert share_styles(page) == (
        "<style>p { }.s0 { fill:none }</style><i style='left:0'></i>"
        '<path d="M 0 0" class="s0"/><use x="1" class="s0"/><text style="x:1" x="2">2</text>'
    )


def test_a_long_curve_is_drawn_in_part_up_to_its_end(run: Path) -> None:
    saw = tuple(float(step % 7) for step in range(201))
    curve = TrainingCurves(
        arm="long",
        steps=tuple(range(1, 202)),
        reward=saw,
        kl=saw,
        entropy=saw,
        length=saw,
        equal_groups=saw,
    )
    panels = draw_training(collect_report(run).model_copy(update={"training": (curve,)}))
    (svg,) = (panel.svg for panel in panels if panel.title == "reward")
    (line,) = re.findall(r'<title>long</title><path d="M ([^"]*)"', svg)
    assert len(line.split()) == 2 * 51  # every fourth, back from the last
    # every sixth of these can be pointed at, back from the last, where the last five are 0, 1, 2, 3 and 4
    assert re.findall(r"<title>long, (steps [^<]*)", svg)[:2] == [
        "steps up to 201: 2.000",
        "steps up to 177: 3.200",
    ]


def test_arms_of_one_colour_have_lines_and_marks_of_their_own() -> None:
    looks = [(colour_of(i), marker_of(i), line_of(i)) for i in range(32)]
    assert len(set(looks)) == 32
    assert (looks[0][0], looks[0][2], looks[8][2]) == (looks[8][0], "-", "--")
    assert looks[0][1] != looks[8][1]


def test_drawings_of_a_task_share_limits_that_hold_their_intervals(run: Path) -> None:
    wide = evaluation("grpo", 0.1, 200, "crafts-harsh")
    rewrite(run, "downstream/grpo/crafts-harsh", lambda e: wide if e.step == 200 else e)
    low, high = limits_of(collect_report(run), "harmful")
    assert low < 0.1 - 1.96 * 0.02
    assert high > 0.95 + 1.96 * 0.02


def test_the_frontier_has_what_each_fine_tune_learned_and_left(run: Path) -> None:
    config = load_recipe(
        ROOT / "recipes" / "testbed.yaml",
        ("downstream.1.replay=0.25", "downstream.1.kl_to_policy=0.1", "downstream.1.lora={rank: 4}"),
    )
    (run / "config.yaml").write_text(dump_config(config))
    file = run / "downstream" / "frpo" / "crafts-harsh" / "done.json"
    result = StageResult.model_validate_json(file.read_text())
    chosen = Interpolation(share=0.75, shares=(0.0, 0.75, 1.0), losses=(2.0, 1.05, 1.0))
    file.write_text(result.model_copy(update={"interpolation": chosen}).model_dump_json())
    points = collect_report(run).frontier
    assert [point.arm for point in points] == list(np.repeat(list(KEPT), 2))
    assert [point.downstream for point in points] == ["crafts-gentle", "crafts-harsh"] * 4
    harsh = points[3]
    assert harsh.learned == pytest.approx(1.0)
    assert (harsh.kept.mean, harsh.kept.se) == (pytest.approx(0.64), 0.02)
    assert harsh.interpolation == chosen
    assert harsh.defence == "replay 0.25, KL to the policy x 0.1, adapters of rank 4"
    assert points[2].defence == ""
    assert points[2].kept.mean == pytest.approx(0.95 - (0.95 - 0.64) / 4)
    page = report.build_report(run).read_text()
    assert "replay 0.25, KL to the policy x 0.1, adapters of rank 4: 0.75 of the way from the arm" in page
    assert "What each fine-tune learned, and what it left" in page


def test_without_held_out_examples_there_is_no_frontier(run: Path) -> None:
    for file in run.glob("downstream/*/*/done.json"):
        result = StageResult.model_validate_json(file.read_text())
        blind = tuple(e.model_copy(update={"downstream_loss": None}) for e in result.evaluations)
        file.write_text(result.model_copy(update={"evaluations": blind}).model_dump_json())
    assert collect_report(run).frontier == ()
    assert "What each fine-tune learned" not in report.build_report(run).read_text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"replay": 0.0, "kl_to_policy": 0.0, "ema": None, "interpolate": [], "lora": "run"}, ""),
        ({"ema": 0.99, "interpolate": [0.5]}, "weights averaged (0.99), interpolated"),
        ({"lora": None}, "no adapters"),
    ],
)
def test_a_defence_in_words(fields: dict[str, object], words: str) -> None:
    assert describe_defence(fields) == words


def measured(arm: str, name: str, step: int, kl: float, harmful: float) -> Evaluation:
    plain = evaluation(arm, harmful, step, name)
    rewards = tuple(t.model_copy(update={"kl_policy": Estimate(mean=kl, se=0.01)}) for t in plain.rewards)
    return plain.model_copy(update={"rewards": rewards})


def certified(run: Path) -> np.ndarray:
    """Certify frpo on harmful prompts, and attack it: once honestly, once below what was certified."""
    rewards = (np.random.default_rng(0).random((40, 64)) > 0.1).astype(float)
    scored = [[Reward(float(r), {}) for r in row] for row in rewards]
    one = make_certificate(
        "harmful",
        scored,
        CertifyConfig(radii=(0.1, 0.5)),
        ObjectiveConfig(estimator=FrpoEstimator(rho=0.4)),
        0,
    )
    for stage, fields in (
        ("certify/frpo", {"certificates": (one,)}),
        ("attack/frpo/0.3", {"evaluations": (measured("frpo", "attack 0.3", 50, 0.3, 0.75),)}),
        ("attack/frpo/0.5", {"evaluations": (measured("frpo", "attack 0.5", 50, 0.5, 0.1),)}),
    ):
        (run / stage).mkdir(parents=True)
        result = StageResult.model_validate(
            {"stage": stage, "inputs": "0" * 64, "seconds": 1.0, "evaluations": (), **fields}
        )
        (run / stage / "done.json").write_text(result.model_dump_json())
    return rewards


@pytest.mark.long
def test_measured_policies_stand_on_the_certificates_plane(run: Path) -> None:
    rewards = certified(run)
    (plane,) = collect_report(run).robustness
    assert (plane.arm, plane.task, plane.radius, plane.num_prompts, plane.num_completions) == (
        "frpo",
        "harmful",
        0.4,
        40,
        64,
    )
    honest, below = (p for p in plane.points if p.attack)
    assert (honest.inside, honest.below, below.inside, below.below) == (True, False, False, True)
    upper = honest.kl.mean + 1.96 * honest.kl.se
    assert honest.certified == reward_lower_bound(rewards, upper, floor=0.0)
    assert honest.plug_in == worst_case_reward(rewards, 0.3)
    assert plane.fine_tunes == ()  # the other fine-tunes of this made-up run were measured without a KL
    assert plane.num_below == 1
    words = " ".join(collect_report(run).headline)
    assert (
        f"Certified reward on harmful prompts within 0.5 nats, 95 %: frpo {plane.certified[1]:.2f}" in words
    )
    assert "1 of 2 measured policies lies below what was certified" in words
    page = report.build_report(run).read_text()
    assert "attack 0.5" in page
    assert "attack 0.3, step 50: reward 0.75 ± 0.04 at 0.30 ± 0.02 nats" in page
    coverage = gather_sweep([run]).arms[1].coverage
    assert coverage
    assert (coverage.certified, coverage.plug_in) == (plane.certified, plane.plug_in)
    assert [
        (p.name, p.step, p.kl.mean, p.reward.mean, p.certified.mean, p.plug_in.mean)
        for p in coverage.policies
    ] == [(p.name, p.step, p.kl.mean, p.reward.mean, p.certified, p.plug_in) for p in plane.points]
    assert (
        report.build_sweep([run], run / "sweep").read_text().count("<svg") == 3
    )  # two fine-tunes, one plane
    assert (run / "sweep" / "coverage.png").read_bytes()[:4] == b"\x89PNG"
    assert "rewards" not in json.loads((run / "report.json").read_text())["robustness"][0]


def rewrite(run: Path, stage: str, change: Callable[[Evaluation], Evaluation]) -> None:
    file = run / stage / "done.json"
    result = StageResult.model_validate_json(file.read_text())
    file.write_text(
        result.model_copy(update={"evaluations": tuple(map(change, result.evaluations))}).model_dump_json()
    )


def of_one_prompt(found: Evaluation) -> Evaluation:
    """The same from a single held-out prompt of each task."""
    alone = [
        t.model_copy(
            update={
                "num_prompts": 1,
                "reward": Estimate(mean=t.reward.mean, se=None),
                "per_prompt": t.per_prompt[:1],
                "kl_policy": Estimate(mean=0.3, se=None),
            }
        )
        for t in found.rewards
    ]
    return found.model_copy(update={"rewards": tuple(alone)})


@pytest.mark.long
def test_a_single_prompt_has_no_interval_anywhere(run: Path) -> None:
    certified(run)
    for file in [
        *run.glob("rlhf/*/done.json"),
        *run.glob("downstream/*/*/done.json"),
        *run.glob("attack/*/*/done.json"),
    ]:
        rewrite(run, str(file.parent.relative_to(run)), of_one_prompt)
    collected = collect_report(run)
    assert "frpo against grpo: +0.14 on harmful prompts" in collected.headline[0]
    assert {c.gained.se for c in collected.comparisons} == {None}
    assert collected.verdict
    assert collected.verdict.decision == "can't tell"
    (robust,) = collected.robustness
    assert {(p.certified, p.below) for p in robust.points} == {
        (robust.floor, False)
    }  # the KL's upper limit is not known
    page = report.build_report(run).read_text()
    assert "0.64 ±" not in page
    assert "NaN" not in (run / "report.json").read_text()
    assert report.build_sweep([run], run / "sweep").exists()
    assert "NaN" not in (run / "sweep" / "sweep.json").read_text()


def test_a_sweep_of_runs_without_a_kl_to_the_reference(run: Path) -> None:
    for name in KEPT:
        rewrite(run, f"rlhf/{name}", lambda e: e.model_copy(update={"kl_reference": None}))
    assert gather_sweep([run]).arms[0].kl is None
    assert report.build_sweep([run], run / "sweep").exists()
    assert "NaN" not in (run / "sweep" / "sweep.json").read_text()


@pytest.mark.long
def test_the_page_says_which_stages_taught_little(run: Path) -> None:
    assert collect_report(run).warnings == ()
    with RunLog(run, load_recipe(ROOT / "recipes" / "testbed.yaml")) as log:
        log.begin("rlhf/frpo", 4)
        for step in range(1, 5):
            log.step("rlhf/frpo", metrics(step, cut_share=0.8, equal_groups=1.0))
    said = collect_report(run).warnings
    assert [s.partition(":")[0] for s in said] == ["rlhf/frpo step 1", "rlhf/frpo step 3"]
    assert (
        "80% of the completions are cut at rollout.max_new_tokens = 7" in report.build_report(run).read_text()
    )


@pytest.mark.long
def test_rows_and_results_of_older_versions(run: Path) -> None:
    """NaN in metrics.jsonl is drawn as nothing; a result with NaN is none."""
    with (run / "metrics.jsonl").open("a") as file:
        row = {**dataclasses.asdict(metrics(7, reward=float("nan"))), "kind": "step", "stage": "rlhf/grpo"}
        file.write(json.dumps(row) + "\n")
    assert collect_report(run).training[0].reward[-1] is None
    assert "NaN" not in (report.build_report(run), (run / "report.json").read_text())[1]
    file = run / "base" / "done.json"
    file.write_text(file.read_text().replace('"mean":0.6', '"mean":NaN'))
    with pytest.raises(
        ConfigError, match=r"base/done.json is no result of a stage .*`frpo run` makes it again"
    ):
        collect_report(run)


@pytest.mark.parametrize(
    ("objective", "settings", "family"),
    [
        (ObjectiveConfig(beta=0.0), "FRPO λ 2.0, no penalty", "FRPO λ 2.0, reverse"),
        (
            ObjectiveConfig(estimator=FrpoEstimator(rho=0.3, jackknife=False, scale="unit"), penalty="k3"),
            "FRPO ρ 0.3, no jackknife, scale unit, β 0.02 k3",
            "FRPO ρ 0.3, no jackknife, scale unit, k3",
        ),
        (
            ObjectiveConfig(estimator=GrpoEstimator(normalize_std=True), target_kl=0.5),
            "GRPO with std, reverse steered to KL 0.5",
            "GRPO with std, reverse",
        ),
        (ObjectiveConfig(estimator=RlooEstimator()), "RLOO, β 0.02 reverse", "RLOO, reverse"),
    ],
)
def test_an_objective_in_words(objective: ObjectiveConfig, settings: str, family: str) -> None:
    assert settings_of(objective) == (settings, family)


@pytest.mark.long
def test_benchmarks_stand_in_the_order_in_which_the_policies_came_to_be(run: Path) -> None:
    for i, stage in enumerate(("harness/base", "harness/frpo/crafts-harsh", "harness/frpo")):
        score = BenchmarkScore(
            task="gsm8k",
            metric="exact_match",
            filter="last-number",
            value=0.1 * (i + 1),
            se=0.05,
            num_examples=40,
        )
        (run / stage).mkdir(parents=True, exist_ok=True)
        result = StageResult(stage=stage, inputs="", seconds=1.0, evaluations=(), scores=(score,))
        (run / stage / "done.json").write_text(result.model_dump_json())
    benchmarks = collect_report(run).benchmarks
    assert [(b.policy, b.scores[0].value) for b in benchmarks] == [
        ("base", pytest.approx(0.1)),
        ("frpo", pytest.approx(0.3)),
        ("frpo after crafts-harsh", pytest.approx(0.2)),
    ]
    assert "0.200 ± 0.098" in report.build_report(run).read_text()


@pytest.mark.long
def test_a_run_without_downstream_still_reports(run: Path) -> None:
    shutil.rmtree(run / "downstream")
    collected = collect_report(run)
    assert collected.comparisons == ()
    assert collected.verdict
    assert (collected.verdict.decision, collected.verdict.arm) == ("can't tell", "grpo")
    assert collected.verdict.why[0] == (
        "grpo has 0.95 reward on harmful prompts, where the base policy has 0.60; what a fine-tune leaves of "
        "it is not measured."
    )
    assert "nothing to compare" in collected.headline[0]
    page = report.build_report(run).read_text()
    assert f"AutoModelForCausalLM.from_pretrained(&#34;{run}/rlhf/grpo/policy&#34;)" in page


def test_the_schema_in_docs_is_current() -> None:
    assert json.loads((ROOT / "docs" / "report.schema.json").read_text()) == Report.model_json_schema()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        report.build_report(tmp_path)


def test_the_tables_in_docs_say_what_the_studies_say() -> None:
    assert (ROOT / "docs" / "results" / "tables.md").read_text() == write_tables(ROOT / "docs" / "results")


@pytest.mark.parametrize("text", ["[", "3", "", "name: a"])
def test_a_configuration_that_is_torn_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"report: .*config\.yaml"):
        collect_report(tmp_path)
