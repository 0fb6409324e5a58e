"""Sweeps: which arms values make, and what many made-up seeds say when the truth is known."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from frpo.config import ConfigError, FrpoEstimator, GrpoEstimator, RlooEstimator
from frpo.recipe import dump_config, load_recipe
from frpo.records import ArmSummary, Estimate, Evaluation, StageResult
from frpo.report import build_sweep, sweep_headline
from frpo.report.comparisons import Comparison
from frpo.report.data import rival_pairs
from frpo.report.intervals import Interval
from frpo.report.schema import Decision
from frpo.report.sweep import gather_sweep
from frpo.report.sweep_headline import SeedVerdict
from frpo.sweep import expand_arms, list_seed_runs, split_assignments
from tests.support.builders import evaluation_of, measured_task, metrics

TESTBED = Path(__file__).parents[2] / "recipes" / "testbed.yaml"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "objective.estimator.lam=[1, x]",
            "--set objective.estimator.lam: Input should be a valid number, "
            "unable to parse string as a number (value "
            "'x')",
        ),
        (
            "objective.estimator.lamb=[1, 2]",
            "--set objective.estimator.lamb: unknown field (value 1); did you mean lam?",
        ),
        (
            "objective.lam=[1, 2]",
            "--set objective.lam: it is a field of the estimator; "
            "write objective.estimator: {kind: frpo, lam: "
            "1} (value 1)",
        ),
        (
            "objective.estimator.normalize_std=[2]",
            "--set objective.estimator.normalize_std: Input should be a valid boolean, "
            "unable to interpret input "
            "(value 2)",
        ),
        ("objective.beta=[0.1, .nan]", "--set objective.beta: Input should be a finite number (value nan)"),
        ("learner.num_steps=[5, 0]", "--set learner.num_steps: Input should be greater than 0 (value 0)"),
        (
            "objective.estimator.lam=[1",
            "--set objective.estimator.lam: not valid YAML: while parsing a flow sequence, "
            "expected ',' or ']', but "
            "got '<stream end>'",
        ),
    ],
)
def test_a_swept_value_that_does_not_fit_is_one_line(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        expand_arms(load_recipe(TESTBED), split_assignments([assignment])[1])
    assert str(raised.value) == message


def test_lists_under_objective_and_learner_are_swept_and_others_are_not() -> None:
    plain, swept = split_assignments(
        (
            "objective.estimator.lam=[0.1, 0.5]",
            "downstream.0.marks=[5]",
            "learner.learning_rate=[1.0e-3]",
            "objective.beta=0.2",
        )
    )
    assert plain == ("downstream.0.marks=[5]", "objective.beta=0.2")
    assert swept == {("objective", "estimator.lam"): [0.1, 0.5], ("learner", "learning_rate"): [1e-3]}
    with pytest.raises(ConfigError, match=r"--set objective.estimator.lam: an empty list"):
        split_assignments(("objective.estimator.lam=[]",))


def test_values_become_arms_and_a_field_that_a_method_does_not_read_leaves_it_alone() -> None:
    config = expand_arms(
        load_recipe(TESTBED, ("arms.3.name=other",)),
        {("objective", "estimator.lam"): [0.1, 2.0], ("objective", "beta"): [0.0, 0.3]},
    )
    arms = {a.name: (a.objective.estimator, a.objective.beta, a.objective.penalty) for a in config.arms}
    assert arms["grpo-beta0.3"] == (GrpoEstimator(), 0.3, "k3")
    assert arms["frpo-lam0.1-beta0.0"] == (FrpoEstimator(lam=0.1), 0.0, "k3")
    assert arms["other-lam2.0-beta0.3"] == (FrpoEstimator(lam=2.0), 0.3, "reverse")
    assert len(arms) == 2 * (2 + 4)
    with pytest.raises(ConfigError, match=r"--set objective.estimator.lambda: unknown field"):
        expand_arms(load_recipe(TESTBED), {("objective", "estimator.lambda"): [0.1]})
    assert [(c.seed, c.folder.name) for c in list_seed_runs(load_recipe(TESTBED), 3, Path("x"))] == [
        (0, "seed-000"),
        (1, "seed-001"),
        (2, "seed-002"),
    ]


def test_estimators_themselves_are_swept_and_take_nothing_of_each_other() -> None:
    config = expand_arms(
        load_recipe(TESTBED, ("arms=[{name: a, objective: {estimator: {lam: 0.5}}}]",)),
        {("objective", "estimator.kind"): ["rloo", "frpo"], ("objective", "estimator.lam"): [0.1, 0.5]},
    )
    assert {a.name: a.objective.estimator for a in config.arms} == {
        "a-kindrloo": RlooEstimator(),
        "a-kindfrpo-lam0.1": FrpoEstimator(lam=0.1),
        "a-kindfrpo-lam0.5": FrpoEstimator(lam=0.5),
    }


ARM = "{{name: {name}-{beta}, objective: {{estimator: {{kind: {kind}}}, beta: {beta}, penalty: reverse}}}}"
GRID = itertools.product(("grpo", "frpo, lam: 0.5"), (0.1, 0.3, 0.6))
ARMS = f"arms=[{', '.join(ARM.format(name=kind[:4], kind=kind, beta=beta) for kind, beta in GRID)}]"
LEAD = 0.1
"""Of FRPO at equal KL, in the made-up truth."""


def make_evaluation(arm: str, reward: float, kl: float, downstream: str | None) -> Evaluation:
    rows = [
        measured_task(task, mean, per_prompt=(mean - 0.2, mean, mean + 0.2))
        for task, mean in (("harmful", reward), ("harmless", 0.8))
    ]
    return evaluation_of(arm, *rows, downstream=downstream, step=1, kl_reference=Estimate(mean=kl, se=0.01))


def write_stage(run: Path, stage: str, measured: Evaluation, arm: ArmSummary | None = None) -> None:
    (run / stage).mkdir(parents=True)
    (run / stage / "done.json").write_text(
        StageResult(stage=stage, inputs="", seconds=1.0, evaluations=(measured,), arm=arm).model_dump_json()
    )


def make_summary(arm: str) -> ArmSummary:
    return ArmSummary(
        arm=arm,
        num_steps=1,
        num_prompts=1,
        num_completions=1,
        num_tokens=1,
        failed_rewards=0,
        seconds=1.0,
        phase_seconds={},
        weights_sha256="",
    )


def made_up(folder: Path, seed: int, lead: float, name: str = "testbed", *sets: str) -> None:
    """Kept reward = 0.4 + 0.5 KL (+ lead for frpo) + noise that all arms of a seed share, and a little of its
    own."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.15)
    config = load_recipe(
        TESTBED,
        (
            ARMS,
            f"name={name}",
            f"seed={seed}",
            "downstream=[{name: d, data: [{path: x.jsonl, task: t, completion: c}], num_steps: 1}]",
            *sets,
        ),
    )
    run = folder / f"seed-{seed:03d}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    with (run / "metrics.jsonl").open("w") as file:
        for arm in config.arms:
            robust = arm.objective.estimator.kind == "frpo"
            kl = 1.0 - arm.objective.beta + 0.1 * robust
            kept = 0.4 + 0.5 * kl + lead * robust + shared + rng.normal(0, 0.01)
            write_stage(
                run, f"rlhf/{arm.name}", make_evaluation(arm.name, 0.95, kl, None), make_summary(arm.name)
            )
            write_stage(run, f"downstream/{arm.name}/d", make_evaluation(arm.name, kept, kl, "d"))
            row = asdict(metrics(1, reward_tasks={"harmful": 0.9, "harmless": 0.8}))
            file.write(json.dumps({"kind": "step", "stage": f"rlhf/{arm.name}", **row}) + "\n")
    (run / "report.json").touch()  # finished; what it says is read from the stages


def length_of(interval: Interval | None) -> float:
    assert interval is not None
    assert interval.lo is not None
    assert interval.hi is not None
    return interval.hi - interval.lo


@pytest.mark.long
def test_equal_kl_comparison_finds_the_lead_and_only_where_there_is_one(tmp_path: Path) -> None:
    for name, lead in (("lead", LEAD), ("none", 0.0)):
        for seed in range(8):
            made_up(tmp_path / name, seed, lead)
        sweep = gather_sweep([tmp_path / name])
        assert sweep.seeds == tuple(range(8))
        assert sweep.focus == "harmful"
        assert [a.family for a in sweep.arms] == ["GRPO without std, reverse"] * 3 + [
            "FRPO λ 0.5, reverse"
        ] * 3
        equal = [c for c in sweep.comparisons if c.matched_by == "kl" and c.metric == "kept after d"]
        assert len(equal) == 3
        for e in equal:
            assert e.difference == pytest.approx(
                lead, abs=0.02
            )  # though FRPO's arms all moved 0.1 nats further
            assert e.num_seeds == 8
            assert e.verdict == (lead > 0)
        same = [c for c in sweep.comparisons if c.matched_by == "beta" and c.metric == "kept after d"]
        assert [(c.a, c.b, c.at_beta) for c in same] == [
            ("FRPO λ 0.5, reverse", "GRPO without std, reverse", b) for b in (0.1, 0.3, 0.6)
        ]
        for c in same:  # at equal β the 0.1 nats that FRPO moved further count as its lead
            assert c.kl_difference is not None
            assert c.kl_difference.mean == pytest.approx(0.1)
            assert c.difference == pytest.approx(0.05 + lead, abs=0.02)
        assert {c.difference for c in sweep.comparisons if c.metric == "other tasks"} == {0.0}
        frpo = next(
            c
            for c in sweep.comparisons
            if (c.matched_by, c.a, c.metric) == ("steps", "frpo-0.1", "kept after d")
        )
        assert frpo.kl_difference is not None
        assert frpo.kl_difference.mean == pytest.approx(0.1)
        assert frpo.difference == pytest.approx(0.05 + lead, abs=0.02)
        assert length_of(frpo.interval) < 0.05  # paired: the noise that arms share is gone
        assert length_of(sweep.arms[0].kept["d"]) > 0.1
    page = build_sweep([tmp_path / "none"], tmp_path / "page").read_text()
    assert "0 of 3 comparisons of kept reward tell two methods apart; in 3 the interval, corrected" in page
    assert page.count("<svg") == 1 + 2  # a fine-tune; two metrics
    assert "The same at equal β, each at its own KL: +0.0" in page
    assert "The 6 comparisons under one weight of the penalty" in page
    assert not [x for x in ("http://", "https://") if f'src="{x}' in page]


def compared(a: str, b: str, finetune: str, difference: float) -> Comparison:
    """At 0.4 nats, over 12 seeds, known to 0.1 and, corrected, to 0.2."""
    return Comparison(
        metric=f"kept after {finetune}",
        a=a,
        b=b,
        matched_by="kl",
        at_kl=0.4,
        at_beta=None,
        kl_difference=None,
        num_seeds=12,
        difference=difference,
        lo=difference - 0.1,
        hi=difference + 0.1,
        corrected_lo=difference - 0.2,
        corrected_hi=difference + 0.2,
    )


def test_the_headline_counts_for_each_pair_and_details_the_fine_tune_that_says_most() -> None:
    rows = [
        compared("gate", "grpo", "gentle", 0.05),
        compared("gate", "grpo", "harsh", 0.3),
        compared("ema", "grpo", "gentle", -0.25),
        compared("ema", "grpo", "harsh", -0.1),
    ]
    words = sweep_headline.of_sweep(
        rows, finetunes=["harsh", "gentle"], focus="jokes", num_seeds=12, intervals="magic"
    )
    assert list(words) == [
        "At equal KL to the reference, 2 of 4 comparisons of kept reward tell two methods apart; in 2 the "
        "interval, corrected for their number, contains 0.",
        "gate against grpo, more in 1 and less in 0 of 2, after harsh: +0.300 [+0.200, +0.400] at KL 0.40*.",
        "ema against grpo, more in 0 and less in 1 of 2, after harsh: -0.100 [-0.200, +0.000] at KL 0.40.",
        "12 seeds; reward on jokes prompts; details after harsh, which left nearest to half; 95 % intervals "
        "by magic, arms paired by both; * where the corrected interval leaves 0 out.",
    ]


def test_a_fine_tune_that_left_nothing_is_not_the_one_in_the_headline(tmp_path: Path) -> None:
    both = ", ".join(
        f"{{name: {name}, data: [{{path: x.jsonl, task: t, completion: c}}], num_steps: 1}}"
        for name in ("poisoned", "d")
    )
    for seed in range(5):
        made_up(tmp_path, seed, 0.0, "testbed", f"downstream=[{both}]")
        for arm in (tmp_path / f"seed-{seed:03d}" / "downstream").iterdir():
            run, stage = arm.parents[1], f"downstream/{arm.name}/poisoned"
            write_stage(run, stage, make_evaluation(arm.name, 0.01 * seed, 3.0, "poisoned"))
    headline = gather_sweep([tmp_path]).headline
    assert "details after d, which left nearest to half" in headline[-1]
    assert headline[1] == "Of 5 seeds the page, by its rules, says: can't tell in 5 (frpo-0.1 5)."


def test_what_the_pages_of_the_seeds_say_is_counted_by_decision_and_arm() -> None:
    said: list[tuple[Decision, str]] = [("ship", "b"), ("don't ship", "a"), ("ship", "a"), ("ship", "a")]
    verdicts = [
        SeedVerdict(seed=seed, decision=decision, arm=arm, policy="")
        for seed, (decision, arm) in enumerate(said)
    ]
    assert list(sweep_headline.of_verdicts(verdicts)) == [
        "Of 4 seeds the page, by its rules, says: ship in 3 (a 2, b 1); don't ship in 1 (a 1)."
    ]
    assert list(sweep_headline.of_verdicts([])) == []


def test_each_is_compared_with_the_first_of_its_own_penalty() -> None:
    assert rival_pairs(["k3"]) == []
    assert rival_pairs(["k3", "k3", "reverse", "reverse", "k3"]) == [(1, 0), (2, 0), (3, 2), (4, 0)]


def test_an_arm_with_other_steps_stands_on_no_curve(tmp_path: Path) -> None:
    made_up(tmp_path, 0, 0.0, "testbed", "arms.2.learner.num_steps=300")
    sweep = gather_sweep([tmp_path])
    assert [a.family for a in sweep.arms[:3]] == ["GRPO without std, reverse"] * 2 + [
        "GRPO without std, reverse, 300 steps"
    ]
    assert sweep.arms[2].settings == "GRPO without std, β 0.6 reverse, 300 steps"
    assert {c.a for c in sweep.comparisons if c.matched_by == "kl"} == {"FRPO λ 0.5, reverse"}


def test_arms_that_differ_in_another_field_stand_on_curves_of_their_own(tmp_path: Path) -> None:
    sets = (
        "arms.4.objective.estimator.scale=exact",
        "arms.5.objective.estimator.scale=exact",
        "arms.5.learner.learning_rate=0.002",
    )
    made_up(tmp_path, 0, 0.0, "testbed", *sets)
    sweep = gather_sweep([tmp_path])
    assert [a.family for a in sweep.arms[3:]] == [
        "FRPO λ 0.5, reverse",
        "FRPO λ 0.5, scale exact, reverse",
        "FRPO λ 0.5, scale exact, reverse, learning_rate 0.002",
    ]
    # no estimator but GRPO has two arms on one curve
    assert not [c for c in sweep.comparisons if c.matched_by == "kl"]


def test_a_folder_without_seeds_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        gather_sweep([tmp_path])


@pytest.mark.long
def test_runs_of_two_names_stand_side_by_side_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed in range(4):
        made_up(tmp_path / "a", seed, 0.0)
    for seed in range(1, 6):
        made_up(tmp_path / "b", seed, LEAD, name="other")
    sweep = gather_sweep([tmp_path / "a", tmp_path / "b"])
    assert (sweep.study, sweep.seeds) == ("other + testbed", (1, 2, 3))
    assert [a.arm for a in sweep.arms[::3]] == [
        "testbed/grpo-0.1",
        "testbed/frpo-0.1",
        "other/grpo-0.1",
        "other/frpo-0.1",
    ]
    gaps = {c.a: c for c in sweep.comparisons if (c.matched_by, c.metric) == ("steps", "kept after d")}
    assert (gaps["other/grpo-0.1"].b, gaps["other/grpo-0.1"].num_seeds) == ("testbed/grpo-0.1", 3)
    assert gaps["other/grpo-0.1"].difference == pytest.approx(0.0, abs=0.02)
    assert gaps["other/frpo-0.1"].difference == pytest.approx(0.05 + LEAD, abs=0.02)
    one = gather_sweep([tmp_path / "a" / "seed-001", tmp_path / "b" / "seed-001"])
    assert one.seeds == (1,)
    assert one.headline[0].endswith(
        ": 3 comparisons of kept reward, none over 5 seeds or more: nothing is shown."
    )
    assert one.headline[-1].startswith("Seeds: 1. From fewer than 5 nothing is said of others: no intervals")
    assert {(c.lo, c.corrected_hi, c.verdict) for c in one.comparisons} == {(None, None, 0)}
    kept = one.arms[0].kept["d"]
    assert kept is not None
    assert (kept.lo, kept.hi) == (None, None)
    assert (
        "from fewer than 5 seeds there are none"
        in build_sweep([tmp_path / "a" / "seed-001"], tmp_path / "p").read_text()
    )
    with pytest.raises(
        ConfigError, match=r"no seed was run once under each of the names \['other', 'testbed'\]"
    ):
        gather_sweep([tmp_path / "a" / "seed-000", tmp_path / "b" / "seed-005"])
