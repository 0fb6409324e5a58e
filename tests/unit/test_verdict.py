"""Which arm to ship: each rule by itself, from made-up arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from frpo.records import ArmSummary, Evaluation, TaskReward
from frpo.report.headline import find_harshest, find_telling, list_finetunes
from frpo.report.paired import difference_of, lower_limit, upper_limit
from frpo.report.schema import Arm, Kept, Rule, Verdict
from frpo.report.student import Difference
from frpo.report.verdict import Contest, decide
from tests.support.builders import evaluation_of, measured_task

NOISE = (0.05, -0.05, 0.05, -0.05)
"""Of four prompts."""
HALF = 0.0919
"""Of the interval of a difference to what has no noise: t(3) 3.182 x 0.05 x sqrt(4/3) / 2."""


def measured(task: str, mean: float, noise: Sequence[float] = (0.0,) * 4) -> TaskReward:
    return measured_task(task, mean, per_prompt=tuple(mean + part for part in noise))


BASE = evaluation_of("base", measured("harmful", 0.5), measured("harmless", 0.7))


def arm(
    name: str,
    before: float,
    kept: dict[str, float],
    harmless: float = 0.8,
    failed: int = 0,
    noise: tuple[float, float] = (1.0, 1.0),
) -> Arm:
    """`noise` in units of NOISE, of harmful and of harmless prompts."""
    noises = [[scale * part for part in NOISE] for scale in noise]
    start = evaluation_of(
        name, measured("harmful", before, noises[0]), measured("harmless", harmless, noises[1])
    )
    after = []
    for finetune, reward in kept.items():
        for task, mean, parts in (("harmful", reward, noises[0]), ("harmless", harmless, noises[1])):
            end = measured(task, mean, parts)
            first = next(each for each in start.rewards if each.task == task)
            after.append(
                Kept(
                    downstream=finetune,
                    task=task,
                    before=first.reward,
                    after=end.reward,
                    per_prompt=end.per_prompt,
                )
            )
    summary = ArmSummary(
        arm=name,
        num_steps=1,
        num_prompts=4,
        num_completions=1000,
        num_tokens=1,
        failed_rewards=failed,
        seconds=1.0,
        phase_seconds={},
        weights_sha256="",
    )
    return Arm(
        name=name,
        settings="",
        family="",
        penalty="reverse",
        beta=0.1,
        target_kl=None,
        lam=None,
        evaluation=start,
        summary=summary,
        kept=tuple(after),
    )


def verdict_of(
    *arms: Arm,
    base: Evaluation | None = BASE,
    warnings: Sequence[str] = (),
    tasks: Sequence[str] = ("harmful", "harmless"),
) -> Verdict:
    return decide(Contest(arms, base, "harmful", tasks, warnings, list_finetunes(arms)), Path("runs/x"))


def rule_of(verdict: Verdict, name: str) -> Rule:
    """Of the first arm."""
    (rule,) = [rule for rule in verdict.judged[0].rules if rule.name == name]
    return rule


def held(verdict: Verdict, name: str) -> dict[str, bool | None]:
    (mine,) = [each for each in verdict.judged if each.arm == name]
    return {rule.name: rule.holds for rule in mine.rules}


def test_the_arm_that_keeps_most_of_those_that_fulfil_all_rules_is_shipped() -> None:
    verdict = verdict_of(
        arm("a", 0.9, {"gentle": 0.9, "harsh": 0.6}),
        arm("b", 0.9, {"gentle": 0.8, "harsh": 0.75}),
        arm("fails", 0.95, {"gentle": 0.9, "harsh": 0.8}, failed=11),
    )
    assert (verdict.decision, verdict.arm, verdict.policy) == ("ship", "b", "runs/x/rlhf/b/policy")
    assert set(held(verdict, "b").values()) == {True}
    assert held(verdict, "fails")["sound"] is False
    assert verdict.why[0] == (
        "After harsh, the fine-tune that costs most, b keeps 0.75 of 0.90 reward on harmful prompts; the "
        "others keep: a 0.60, fails 0.80."
    )


def test_a_verdict_says_how_its_policy_is_loaded_and_by_which_rules() -> None:
    verdict = verdict_of(arm("a", 0.9, {"harsh": 0.8}))
    assert verdict.why[0] == (
        "After harsh, the fine-tune that costs most, a keeps 0.80 of 0.90 reward on harmful prompts."
    )
    assert verdict.load.splitlines() == [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("runs/x/rlhf/a/policy")',
        'tokenizer = AutoTokenizer.from_pretrained("runs/x/rlhf/a/policy")',
    ]
    assert verdict.rules == {
        "learned": "before any fine-tune it has more reward on harmful prompts than the base policy",
        "lasts": "after every fine-tune it still has more reward on harmful prompts than the base policy",
        "price": "on other trained tasks it is at no time more than 0.05 below the best",
        "sound": "its training had a signal, and at most 1% of its rewards failed",
    }
    assert [rule.remedy for rule in verdict.judged[0].rules] == [""] * 4


def test_what_the_harshest_fine_tune_left_counts_first_then_the_average_then_the_start() -> None:
    more_on_average = arm("a", 0.9, {"gentle": 0.95, "harsh": 0.65})
    assert verdict_of(more_on_average, arm("b", 0.9, {"gentle": 0.75, "harsh": 0.7})).arm == "b"
    # 0.6955 and 0.7045 read the same, so that neither is said to keep more
    alike = verdict_of(
        arm("a", 0.9, {"gentle": 0.75, "harsh": 0.7045}), arm("b", 0.9, {"gentle": 0.9, "harsh": 0.6955})
    )
    assert alike.arm == "b"
    assert not [line for line in alike.why if "more." in line]
    assert verdict_of(arm("a", 0.8, {"harsh": 0.7}), arm("b", 0.9, {"harsh": 0.7})).arm == "b"


def test_what_was_not_measured_counts_for_nothing() -> None:
    part, whole = arm("a", 0.9, {"gentle": 0.9}), arm("b", 0.9, {"gentle": 0.9, "harsh": 0.55})
    assert verdict_of(part, whole).arm == "b"
    none = arm("a", 0.9, {}, failed=11)
    assert verdict_of(none, arm("b", 0.9, {"harsh": 0.001}, failed=11)).arm == "b"
    blind = arm("a", 0.9, {"harsh": 0.5})
    harmless = evaluation_of("a", measured("harmless", 0.8))
    blind = blind.model_copy(update={"evaluation": harmless})
    verdict = verdict_of(blind, arm("b", 0.9, {"harsh": 0.5}))
    assert (verdict.decision, verdict.arm) == ("can't tell", "b")
    learned = rule_of(verdict, "learned")
    assert (learned.holds, learned.figures) == (None, "not measured")
    assert learned.remedy == "Let the run go on to its end."


@pytest.mark.parametrize(
    ("before", "kept", "learned", "lasts", "decision"),
    [
        (0.5 + HALF + 0.001, 0.5 + HALF + 0.001, True, True, "ship"),
        (0.5 + HALF - 0.001, 0.9, None, True, "can't tell"),
        (0.9, 0.5 + HALF - 0.001, True, None, "can't tell"),
        (0.9, 0.5 - HALF + 0.001, True, None, "can't tell"),
        (0.9, 0.5 - HALF - 0.001, True, False, "don't ship"),
        (0.5 - HALF - 0.001, 0.9, False, True, "don't ship"),
    ],
)
def test_more_than_the_base_policy_where_the_interval_says_so(
    before: float, kept: float, learned: bool | None, lasts: bool | None, decision: str
) -> None:
    verdict = verdict_of(arm("a", before, {"harsh": kept}))
    rules = held(verdict, "a")
    assert (rules["learned"], rules["lasts"], verdict.decision) == (learned, lasts, decision)


def test_a_policy_that_is_surely_as_good_as_the_base_has_learned_nothing() -> None:
    verdict = verdict_of(arm("a", 0.5, {"harsh": 0.9}, noise=(0.0, 0.0)))
    assert held(verdict, "a")["learned"] is False


def test_the_figures_of_what_lasts_are_of_the_fine_tune_that_left_least() -> None:
    lasts = rule_of(verdict_of(arm("a", 0.9, {"gentle": 0.8, "harsh": 0.7, "sweet": 0.75})), "lasts")
    assert lasts.figures == "+0.20 [+0.11, +0.29] against the base policy after harsh"


@pytest.mark.parametrize(("rivals", "lasts"), [(0, True), (1, None)])
def test_of_more_arms_more_is_asked(rivals: int, lasts: bool | None) -> None:
    """0.11 above the base policy: t(3) x 0.0289 is 0.092 at 95 %, and 0.121 at 97.5 %."""
    others = [arm(f"other{i}", 0.9, {"harsh": 0.9}) for i in range(rivals)]
    assert held(verdict_of(arm("a", 0.9, {"harsh": 0.61}), *others), "a")["lasts"] is lasts


def test_every_fine_tune_counts_and_must_be_measured() -> None:
    verdict = verdict_of(arm("both", 0.9, {"gentle": 0.9, "harsh": 0.3}), arm("one", 0.9, {"gentle": 0.9}))
    assert held(verdict, "both")["lasts"] is False
    assert held(verdict, "one")["lasts"] is None
    assert (verdict.decision, verdict.arm) == ("can't tell", "one")
    assert verdict.why[-1] == (
        "The rule “lasts” is not known: 1 of 2 fine-tunes are measured. Let the run go on to its end."
    )


@pytest.mark.parametrize(
    ("behind", "holds"),
    [
        (0.05 - HALF / 4 - 0.001, True),
        (0.05 - HALF / 4 + 0.001, None),
        (0.05 + HALF / 4 - 0.001, None),
        (0.05 + HALF / 4 + 0.001, False),
    ],
)
def test_the_price_is_known_where_the_interval_leaves_it_out(behind: float, holds: bool | None) -> None:
    verdict = verdict_of(
        arm("cheap", 0.9, {"harsh": 0.6}, harmless=0.9, noise=(0.0, 0.0)),
        arm("dear", 0.9, {"harsh": 0.8}, harmless=0.9 - behind, noise=(1.0, 0.25)),
    )
    assert held(verdict, "dear")["price"] is holds
    assert held(verdict, "cheap")["price"] is True
    assert (verdict.decision, verdict.arm) == ("ship", "dear" if holds else "cheap")
    if holds:
        assert verdict.why[1] == (
            "What it pays on harmless prompts: 0.87 before any fine-tune (cheap has 0.90), "
            "0.87 after harsh (cheap has 0.90)."
        )
    else:
        assert verdict.why[1] == (
            "It pays nothing on harmless prompts: 0.90 before any fine-tune (no arm has more), "
            "0.90 after harsh (no arm has more)."
        )
        outcome = "is not known" if holds is None else "does not hold"
        assert verdict.why[2].startswith(
            f"dear keeps 0.20 more. The rule “price” {outcome}: {-behind:.2f} [{-behind - HALF / 4:.2f}, "
        )


def test_the_price_is_against_the_best_on_the_average() -> None:
    """cheap has more on the average, dear on the first prompt."""
    dear = arm("dear", 0.9, {"harsh": 0.8}, harmless=0.86, noise=(1.0, 1.0))
    price = rule_of(verdict_of(dear, arm("cheap", 0.9, {"harsh": 0.6}, harmless=0.9, noise=(0, 0))), "price")
    assert price.figures == "-0.04 [-0.13, +0.05] on harmless prompts before any fine-tune, against cheap"


def test_a_policy_may_cost_all_of_the_price() -> None:
    base = evaluation_of("base", measured("harmful", 0.5), measured("harmless", 0.0))
    exactly = arm("a", 0.9, {"harsh": 0.8}, harmless=0.05, noise=(1.0, 0.0))
    best = arm("b", 0.9, {"harsh": 0.7}, harmless=0.1, noise=(1.0, 0.0))
    assert held(verdict_of(exactly, best, base=base), "a")["price"] is True
    beyond = arm("a", 0.9, {"harsh": 0.8}, harmless=0.04, noise=(1.0, 0.0))
    price = rule_of(verdict_of(beyond, best, base=base), "price")
    assert (price.holds, price.remedy) == (
        False,
        "Give those prompts more of data.mix, or hold it nearer to the base policy (objective.beta).",
    )


def test_one_task_alone_has_no_price() -> None:
    price = rule_of(verdict_of(arm("a", 0.9, {"harsh": 0.8}), tasks=["harmful"]), "price")
    assert (price.holds, price.figures) == (True, "there is no other trained task")


def test_what_the_base_policy_has_more_of_is_paid_too() -> None:
    base = evaluation_of("base", measured("harmful", 0.0), measured("harmless", 0.95))
    verdict = verdict_of(arm("a", 0.9, {"harsh": 0.8}), base=base)
    assert held(verdict, "a")["price"] is False
    assert verdict.why[1] == (
        "What it pays on harmless prompts: 0.80 before any fine-tune (base has 0.95), "
        "0.80 after harsh (no arm has more)."
    )


def test_where_it_cannot_be_told_an_arm_that_keeps_more_is_said_with_what_it_breaks() -> None:
    """No prompt tells whether near is dearer than the price; far surely is."""
    best = arm("best", 0.9, {"harsh": 0.1}, harmless=0.9, failed=11)
    near = arm("near", 0.9, {"harsh": 0.6}, harmless=0.86)
    verdict = verdict_of(best, near, arm("far", 0.9, {"harsh": 0.8}, harmless=0.5))
    assert (verdict.decision, verdict.arm) == ("can't tell", "near")
    assert verdict.why[-1].startswith("far keeps 0.20 more. The rule “price” does not hold: -0.40 [")


def test_what_reads_the_same_to_two_digits_is_no_more() -> None:
    base = evaluation_of("base", measured("harmful", 0.0), measured("harmless", 0.0))
    verdict = verdict_of(
        arm("a", 0.9, {"harsh": 0.005}, harmless=0.005, noise=(0.0, 0.0)),
        arm("b", 0.9, {"harsh": 0.01}, harmless=0.01, failed=11, noise=(0.0, 0.0)),
        base=base,
    )
    assert verdict.arm == "a"
    assert verdict.why[1].startswith("What it pays on harmless prompts: 0.01 before any fine-tune (b has")
    assert verdict.why[-1].startswith("b keeps 0.01 more.")  # 0.005 reads 0.01, as do both rewards


@pytest.mark.parametrize(
    ("failed", "completions", "warned", "holds", "figures"),
    [
        (10, 1000, 0, True, "1.0% of its rewards failed"),
        (11, 1000, 0, False, "1.1% of its rewards failed"),
        (1, 1, 0, False, "100.0% of its rewards failed"),
        (0, 0, 2, False, "0.0% of its rewards failed; warnings: 2"),
    ],
)
def test_training_is_sound_up_to_one_failed_reward_in_a_hundred(
    failed: int, completions: int, warned: int, holds: bool, figures: str
) -> None:
    one = arm("a", 0.9, {"harsh": 0.8}, failed=failed)
    summary = one.summary.model_copy(update={"num_completions": completions})
    one = one.model_copy(update={"summary": summary})
    sound = rule_of(verdict_of(one, warnings=["rlhf/a step 3: no signal"] * warned), "sound")
    assert (sound.holds, sound.figures) == (holds, figures)


def test_a_price_that_one_prompt_was_measured_on_is_not_known() -> None:
    start = evaluation_of("base", measured("harmful", 0.5), measured_task("harmless", 0.7, per_prompt=(0.7,)))
    rules = held(verdict_of(arm("a", 0.9, {"harsh": 0.8}, harmless=0.6), base=start), "a")
    assert rules["price"] is None


def test_the_figures_of_a_price_are_of_the_gap_that_decides() -> None:
    """Surely 0.06 below an arm after one fine-tune; 0.07 below it after another, where it may be none."""
    best = arm("best", 0.9, {"gentle": 0.9, "harsh": 0.8}, harmless=0.9, noise=(1.0, 0.0))
    dear = arm("dear", 0.9, {"gentle": 0.9, "harsh": 0.8}, harmless=0.9, noise=(1.0, 0.0))
    ends = {"gentle": measured("harmless", 0.84), "harsh": measured("harmless", 0.83, NOISE)}
    kept = []
    for each in dear.kept:
        end = ends[each.downstream]
        paid = {"after": end.reward, "per_prompt": end.per_prompt} if each.task == "harmless" else {}
        kept.append(each.model_copy(update=paid))
    judged = verdict_of(best, dear.model_copy(update={"kept": tuple(kept)})).judged[1]
    (price,) = [rule for rule in judged.rules if rule.name == "price"]
    assert (price.holds, price.figures) == (
        False,
        "-0.06 [-0.06, -0.06] on harmless prompts after gentle, against best",
    )


def test_what_a_fine_tune_costs_on_other_tasks_is_part_of_the_price() -> None:
    arms = arm("a", 0.9, {"harsh": 0.8}, harmless=0.9), arm("b", 0.9, {"harsh": 0.7}, harmless=0.9)
    lost = measured("harmless", 0.6, NOISE)
    kept = [
        each.model_copy(update={"after": lost.reward, "per_prompt": lost.per_prompt})
        if each.task == "harmless"
        else each
        for each in arms[0].kept
    ]
    verdict = verdict_of(arms[0].model_copy(update={"kept": tuple(kept)}), arms[1])
    assert held(verdict, "a")["price"] is False
    assert (verdict.decision, verdict.arm) == ("ship", "b")
    assert verdict.why[-1] == (
        "a keeps 0.10 more. The rule “price” does not hold: -0.30 [-0.30, -0.30] on harmless prompts after "
        "harsh, against b."
    )


def test_the_base_policy_is_a_rival_in_price() -> None:
    base = evaluation_of("base", measured("harmful", 0.5), measured("harmless", 0.95))
    verdict = verdict_of(arm("a", 0.9, {"harsh": 0.8}), base=base)
    assert held(verdict, "a")["price"] is False
    (rule,) = [rule for rule in verdict.judged[0].rules if rule.name == "price"]
    assert rule.figures == "-0.15 [-0.24, -0.06] on harmless prompts before any fine-tune, against base"


def test_many_others_are_told_by_their_range() -> None:
    arms = [arm(f"a{i}", 0.9, {"harsh": 0.6 + i / 50}) for i in range(5)]
    assert (
        verdict_of(*arms)
        .why[0]
        .endswith("a4 keeps 0.68 of 0.90 reward on harmful prompts; the other 4 keep 0.60 to 0.66.")
    )


def test_a_warning_speaks_of_its_own_arm_alone() -> None:
    arms = arm("a", 0.9, {"harsh": 0.8}), arm("ab", 0.9, {"harsh": 0.7})
    verdict = verdict_of(*arms, warnings=("rlhf/a step 3: all 24 groups had equal rewards",))
    assert held(verdict, "a")["sound"] is False
    assert held(verdict, "ab")["sound"] is True
    assert verdict.arm == "ab"


def test_arms_that_the_prompts_cannot_tell_apart_are_named() -> None:
    verdict = verdict_of(
        arm("a", 0.9, {"harsh": 0.80}, noise=(0.0, 0.0)),
        arm("near", 0.9, {"harsh": 0.76}, noise=(1.0, 0.0)),
        arm("nearer", 0.9, {"harsh": 0.79}, noise=(1.0, 0.0)),
        arm("far", 0.9, {"harsh": 0.60}, noise=(0.5, 0.0)),
    )
    assert held(verdict, "far")["lasts"] is True
    assert verdict.why[-1] == (
        "These held-out prompts cannot tell it from near (+0.04 [-0.12, +0.20]), nearer (+0.01 [-0.15, "
        "+0.17])."
    )


def test_an_arm_that_keeps_surely_as_much_is_a_rival() -> None:
    arms = [arm(name, 0.9, {"harsh": 0.75}, noise=(0.0, 0.0)) for name in "ab"]
    assert verdict_of(*arms).why[-1] == (
        "These held-out prompts cannot tell it from b (+0.00 [+0.00, +0.00])."
    )


def test_of_arms_that_lose_everything_to_the_worst_the_one_that_keeps_more_of_the_others_is_nearest() -> None:
    verdict = verdict_of(
        arm("a", 0.9, {"gentle": 0.6, "harsh": 0.001}), arm("b", 0.9, {"gentle": 0.8, "harsh": 0.0})
    )
    assert (verdict.decision, verdict.arm) == ("don't ship", "b")


def test_without_a_base_policy_nothing_is_known() -> None:
    verdict = verdict_of(arm("a", 0.9, {"harsh": 0.8}), base=None)
    assert verdict.decision == "can't tell"
    assert held(verdict, "a") == {"learned": None, "lasts": None, "price": True, "sound": True}
    unmeasured = verdict_of(arm("a", 0.9, {}), base=None)
    assert unmeasured.why[0] == (
        "a has 0.90 reward on harmful prompts; what a fine-tune leaves of it is not measured."
    )


def test_without_a_fine_tune_what_can_be_judged_is_and_what_is_missing_is_said() -> None:
    verdict = verdict_of(arm("a", 0.9, {}), arm("b", 0.8, {}, failed=11))
    assert (verdict.decision, verdict.arm, verdict.policy) == ("can't tell", "a", "runs/x/rlhf/a/policy")
    assert held(verdict, "a") == {"learned": True, "lasts": None, "price": True, "sound": True}
    assert held(verdict, "b")["sound"] is False
    assert verdict.why == (
        "a has 0.90 reward on harmful prompts, where the base policy has 0.50; what a fine-tune leaves of it "
        "is not measured.",
        "It pays nothing on harmless prompts: 0.80 before any fine-tune (no arm has more).",
        "The rule “lasts” is not known: no fine-tune is asked for. Give a downstream task (downstream).",
    )


def test_a_rule_that_does_not_hold_names_what_may_mend_it() -> None:
    verdict = verdict_of(arm("a", 0.9, {"harsh": 0.3}, failed=11))
    assert verdict.why[-2:] == (
        "The rule “lasts” does not hold: -0.20 [-0.29, -0.11] against the base policy after harsh. Protect "
        "the fine-tune (replay or kl_to_policy of downstream), or train the arm for more steps.",
        "The rule “sound” does not hold: 1.1% of its rewards failed. See the warnings above, and in run.log "
        "which reward failed.",
    )
    (open_rule,) = [
        rule.remedy for rule in verdict_of(arm("a", 0.9, {"harsh": 0.55})).judged[0].rules if not rule.holds
    ]
    assert open_rule == "More held-out prompts (data.heldout) would tell."


def test_the_fine_tune_that_says_most_left_about_half() -> None:
    arms = [arm(name, 0.9, {"all": 0.9, "half": 0.5, "none": 0.0}) for name in "ab"]
    assert (find_telling(arms, "harmful"), find_harshest(arms, "harmful")) == ("half", "none")
    verdict = verdict_of(*arms)
    assert verdict.why[0].startswith("After none, the fine-tune that costs most, a keeps 0.00 of 0.90")


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    arms = arm("a", 0.9, {"harsh": 0.8}, harmless=0.796), arm("b", 0.9, {"harsh": 0.8}, harmless=0.8)
    (price,) = [rule for rule in verdict_of(*arms).judged[0].rules if rule.name == "price"]
    assert price.figures == "+0.00 [+0.00, +0.00] on harmless prompts before any fine-tune, against b"


def test_a_difference_is_paired_and_has_no_limits_from_one_prompt() -> None:
    pairs = difference_of((0.5, (0.2, 0.8, None)), (0.4, (0.1, 0.7, 0.3)))
    assert pairs.mean == pytest.approx(0.1)
    assert pairs.se == pytest.approx(0.0)
    one = difference_of((0.5, (0.5, None)), (0.4, (0.4, 0.3)))
    assert (one.se, lower_limit(one), upper_limit(one)) == (None, -float("inf"), float("inf"))
    unlike = difference_of((0.5, ()), (0.4, (0.4, 0.3)), 0.9)
    assert unlike == Difference(mean=0.5 - 0.4, se=None, num_prompts=0, confidence=0.9)
    # means are over completions, of which prompts may have unlike numbers: they stand where none failed
    assert difference_of((0.5, (0.4, 0.4)), (0.2, (0.2, 0.2))).mean == pytest.approx(0.3)
    assert difference_of((0.5, (0.5, None)), (0.4, (0.3, 0.5))).mean == pytest.approx(0.2)


def test_a_prompt_whose_rewards_failed_for_one_policy_is_no_lead_of_that_policy() -> None:
    # on the three prompts that both have they are equal; b alone has the hard one
    gap = difference_of((0.9, (0.9, 0.9, 0.9, None)), (0.675, (0.9, 0.9, 0.9, 0.0)))
    assert (gap.mean, gap.se) == (0.0, 0.0)
    nothing = difference_of((0.9, (0.9, None)), (0.1, (None, 0.1)))
    assert (nothing.mean, nothing.se) == (pytest.approx(0.8), None)
    base = evaluation_of(
        "base", measured_task("harmful", 0.675, per_prompt=(0.9, 0.9, 0.9, 0.0)), measured("harmless", 0.7)
    )
    failed = measured_task("harmful", 0.9, per_prompt=(0.9, 0.9, 0.9, None))
    trained = arm("a", 0.9, {"harsh": 0.9})
    start = evaluation_of("a", failed, measured("harmless", 0.8))
    verdict = verdict_of(trained.model_copy(update={"evaluation": start}), base=base)
    assert held(verdict, "a")["learned"] is not True
