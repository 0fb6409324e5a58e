"""Which arm to ship: by four rules that stand on the page, each with the figures that it was judged by.

It speaks of these policies, which one seed has made, and not of the methods that made them. Differences are
paired by held-out prompt, with 95 % intervals: those that speak for an arm hold for all arms together
(Bonferroni), as it is the best of them that is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from frpo.records import Evaluation
from frpo.report.headline import MANY_ARMS, find_harshest, kept_after_finetune
from frpo.report.lookup import task_measured, task_reward
from frpo.report.paired import (
    Rewarded,
    difference_of,
    kept_rewards,
    lower_limit,
    rewards_of,
    upper_limit,
)
from frpo.report.schema import Arm, Decision, Judged, Rule, Verdict
from frpo.report.student import CONFIDENCE, Difference

PRICE = 0.05
"""Reward on another task that a policy may cost."""
MOST_FAILED = 0.01
"""Share of completions whose reward failed."""
SAME = 0.005
"""Rewards that are nearer read the same to two digits."""
BEFORE = "before any fine-tune"
REMEDIES = {
    "learned": "Train it for more steps, or hold it less near to the base policy (objective.beta).",
    "lasts": "Protect the fine-tune (replay or kl_to_policy of downstream), or train the arm for more steps.",
    "price": "Give those prompts more of data.mix, or hold it nearer to the base policy (objective.beta).",
    "sound": "See the warnings above, and in run.log which reward failed.",
}
"""What may make a rule hold that does not."""
MORE_PROMPTS = "More held-out prompts (data.heldout) would tell."
FINISH = "Let the run go on to its end."
ASK_FINETUNE = "Give a downstream task (downstream)."
DECISIONS: dict[bool | None, Decision] = {True: "ship", None: "can't tell", False: "don't ship"}
"""By the best that an arm does, the best first."""


@dataclass(frozen=True)
class Contest:
    """Arms that were trained in one run."""

    arms: Sequence[Arm]
    base: Evaluation | None
    focus: str
    """The trained task that lost most, or was gained most on where no fine-tune is measured."""
    tasks: Sequence[str]
    """That were trained."""
    warnings: Sequence[str]
    """Of the run's stages."""
    finetunes: Sequence[str]
    """That the run asks for, done or not."""

    @property
    def other_tasks(self) -> list[str]:
        return sorted(set(self.tasks) - {self.focus})

    @property
    def harshest(self) -> str | None:
        """The fine-tune that cost most; None where none is measured."""
        return find_harshest(self.arms, self.focus) if any(arm.kept for arm in self.arms) else None

    def lead(self, a: Rewarded, b: Rewarded) -> Difference:
        """Of a over b, with an interval that holds for all arms together."""
        return difference_of(a, b, 1 - (1 - CONFIDENCE) / len(self.arms))

    def kept(self, arm: Arm) -> dict[str, Rewarded]:
        """Reward on the focus task after each fine-tune."""
        return {each.downstream: kept_rewards(each) for each in arm.kept if each.task == self.focus}

    def rewarded(self, task: str) -> dict[str, dict[str, Rewarded]]:
        """Reward on a task before any fine-tune and after each one: when -> arm or base."""
        evaluations = [arm.evaluation for arm in self.arms] + ([self.base] if self.base else [])
        measured = {each.arm: task_measured(each, task) for each in evaluations}
        rewarded = {BEFORE: {name: rewards_of(of) for name, of in measured.items() if of}}
        for arm in self.arms:
            for kept in arm.kept:
                if kept.task == task:
                    rewarded.setdefault(f"after {kept.downstream}", {})[arm.name] = kept_rewards(kept)
        return rewarded


def decide(contest: Contest, folder: Path) -> Verdict:
    """`folder` is the run's."""
    judged = tuple(Judged(arm=arm.name, rules=tuple(_judge(arm, contest))) for arm in contest.arms)
    held = {each.holds for each in judged}
    best = next(holds for holds in DECISIONS if holds in held)
    standing = [arm for arm, each in zip(contest.arms, judged, strict=True) if each.holds is best]
    chosen = _choose(standing, contest)
    why = [*_say_kept(chosen, contest), *_say_price(chosen, contest)]
    if best is True:
        why += _say_rivals(chosen, standing, contest)
    else:
        mine = next(each for each in judged if each.arm == chosen.name)
        why += [f"{_say_rule(rule)} {rule.remedy}" for rule in mine.rules if rule.holds is not True]
    why += _say_refused(chosen, judged, contest)
    policy = folder / "rlhf" / chosen.name / "policy"
    return Verdict(
        decision=DECISIONS[best],
        arm=chosen.name,
        why=tuple(why),
        policy=str(policy),
        load=load_lines(policy),
        rules=describe_rules(contest.focus),
        judged=judged,
    )


def describe_rules(focus: str) -> dict[str, str]:
    return {
        "learned": f"before any fine-tune it has more reward on {focus} prompts than the base policy",
        "lasts": f"after every fine-tune it still has more reward on {focus} prompts than the base policy",
        "price": f"on other trained tasks it is at no time more than {PRICE} below the best",
        "sound": f"its training had a signal, and at most {MOST_FAILED:.0%} of its rewards failed",
    }


def load_lines(policy: Path) -> str:
    """Python that loads a policy of a run, or an adapter with the model that it stands on."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{policy}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{policy}")'
    )


def _choose(standing: Sequence[Arm], contest: Contest) -> Arm:
    """Of arms that the rules do not tell apart, the one that kept most after the fine-tune that cost most; of
    those that kept equally much, the one that kept most on the average; then the one that had most before."""
    harshest = contest.harshest or ""

    def rank(arm: Arm) -> tuple[float, float, float]:
        kept = {finetune: mean for finetune, (mean, _) in contest.kept(arm).items()}
        before = task_reward(arm.evaluation, contest.focus)
        return (
            round(kept.get(harshest, 0.0), 2),
            fmean(kept.values() or [0.0]),
            before.mean if before else 0.0,
        )

    return max(standing, key=rank)


def _judge(arm: Arm, contest: Contest) -> Iterator[Rule]:
    measured = task_measured(arm.evaluation, contest.focus)
    trained = {BEFORE: rewards_of(measured)} if measured else {}
    kept = contest.kept(arm)
    yield _more_than_base("learned", contest, trained)
    after = {f"after {name}": of for name, of in kept.items()}
    yield _more_than_base("lasts", contest, after, contest.finetunes)
    yield _judge_price(arm, contest)
    yield _judge_sound(arm, contest)


def _more_than_base(
    name: str, contest: Contest, policies: Mapping[str, Rewarded], asked: Sequence[str] = ("",)
) -> Rule:
    """Whether all that is `asked` for surely has more reward than the base policy; not known where one is
    not measured, or may not have."""
    base = task_measured(contest.base, contest.focus) if contest.base else None
    if not asked:
        return Rule(name=name, holds=None, figures="no fine-tune is asked for", remedy=ASK_FINETUNE)
    if base is None or not policies:
        return Rule(name=name, holds=None, figures="not measured", remedy=FINISH)
    gaps = {when: contest.lead(rewards, rewards_of(base)) for when, rewards in policies.items()}
    when, least = min(gaps.items(), key=lambda item: item[1].mean)
    figures = f"{least:+z.2f} against the base policy {when}"
    if any(upper_limit(gap) <= 0 for gap in gaps.values()):
        return Rule(name=name, holds=False, figures=figures, remedy=REMEDIES[name])
    if len(gaps) < len(asked):
        measured = f"{len(gaps)} of {len(asked)} fine-tunes are measured"
        return Rule(name=name, holds=None, figures=measured, remedy=FINISH)
    surely = all(lower_limit(gap) > 0 for gap in gaps.values())
    return _leave_open(name, surely, figures)


def _leave_open(name: str, surely: bool, figures: str) -> Rule:
    """A rule that holds, or that more prompts would settle."""
    return Rule(name=name, holds=surely or None, figures=figures, remedy="" if surely else MORE_PROMPTS)


def _judge_price(arm: Arm, contest: Contest) -> Rule:
    """By the gap that decides: the one that is surely larger than the price, else the one that may be."""
    gaps = {}
    for task in contest.other_tasks:
        for when, rewarded in contest.rewarded(task).items():
            if arm.name in rewarded:
                best = max(rewarded, key=lambda name: rewarded[name][0])
                gap = difference_of(rewarded[arm.name], rewarded[best])
                gaps[f"{task} prompts {when}, against {best}"] = gap
    if not gaps:
        return Rule(name="price", holds=True, figures="there is no other trained task")
    where, gap = min(gaps.items(), key=lambda item: upper_limit(item[1]))
    if upper_limit(gap) < -PRICE:
        figures = f"{gap:+z.2f} on {where}"
        return Rule(name="price", holds=False, figures=figures, remedy=REMEDIES["price"])
    where, gap = min(gaps.items(), key=lambda item: lower_limit(item[1]))
    return _leave_open("price", lower_limit(gap) >= -PRICE, f"{gap:+z.2f} on {where}")


def _judge_sound(arm: Arm, contest: Contest) -> Rule:
    share = arm.summary.failed_rewards / max(1, arm.summary.num_completions)
    spoken = sum(text.startswith(f"rlhf/{arm.name} ") for text in contest.warnings)
    warned = f"; warnings: {spoken}" if spoken else ""
    holds = not spoken and share <= MOST_FAILED
    figures = f"{share:.1%} of its rewards failed{warned}"
    return Rule(name="sound", holds=holds, figures=figures, remedy="" if holds else REMEDIES["sound"])


def _say_kept(chosen: Arm, contest: Contest) -> Iterator[str]:
    harshest = contest.harshest
    if harshest is None:
        yield from _say_gained(chosen, contest)
        return
    kept = kept_after_finetune(contest.arms, harshest, contest.focus)
    if chosen.name not in kept:
        return
    mine = kept[chosen.name]
    others = {name: each.after.mean for name, each in kept.items() if name != chosen.name}
    rest = ""
    if len(others) >= MANY_ARMS:
        rest = f"; the other {len(others)} keep {min(others.values()):.2f} to {max(others.values()):.2f}"
    elif others:
        rest = f"; the others keep: {', '.join(f'{name} {reward:.2f}' for name, reward in others.items())}"
    yield (
        f"After {harshest}, the fine-tune that costs most, {chosen.name} keeps {mine.after.mean:.2f} of "
        f"{mine.before.mean:.2f} reward on {contest.focus} prompts{rest}."
    )


def _say_gained(chosen: Arm, contest: Contest) -> Iterator[str]:
    """Where no fine-tune is measured."""
    mine = task_reward(chosen.evaluation, contest.focus)
    base = task_reward(contest.base, contest.focus) if contest.base else None
    if mine:
        start = f", where the base policy has {base.mean:.2f}" if base else ""
        yield (
            f"{chosen.name} has {mine.mean:.2f} reward on {contest.focus} prompts{start}; what a fine-tune "
            "leaves of it is not measured."
        )


def _say_rule(rule: Rule) -> str:
    """One that does not hold, or is not known."""
    outcome = "does not hold" if rule.holds is False else "is not known"
    return f"The rule “{rule.name}” {outcome}: {rule.figures}."


def _say_price(chosen: Arm, contest: Contest) -> Iterator[str]:
    """What it has less than the best arm on other trained tasks, before any fine-tune and after the one that
    costs most."""
    harshest = f"after {contest.harshest}"
    for task in contest.other_tasks:
        levels = []
        pays = False
        for when, rewarded in contest.rewarded(task).items():
            means = {name: mean for name, (mean, _) in rewarded.items()}
            if when in (BEFORE, harshest) and chosen.name in means:
                best = max(means, key=means.__getitem__)
                short = means[best] - means[chosen.name] >= SAME
                most = f"{best} has {means[best]:.2f}" if short else "no arm has more"
                levels.append(f"{means[chosen.name]:.2f} {when} ({most})")
                pays = pays or short
        if levels:
            yield f"{'What it pays' if pays else 'It pays nothing'} on {task} prompts: {', '.join(levels)}."


def _say_rivals(chosen: Arm, standing: Sequence[Arm], contest: Contest) -> Iterator[str]:
    """Arms that fulfil the rules too, and that the held-out prompts can't tell from it."""
    harshest = contest.harshest or ""
    alike = []
    for arm in standing:
        gap = contest.lead(contest.kept(chosen)[harshest], contest.kept(arm)[harshest])
        if arm is not chosen and lower_limit(gap) <= 0:
            alike.append(f"{arm.name} ({gap:+z.2f})")
    if alike:
        yield f"These held-out prompts cannot tell it from {', '.join(alike)}."


def _say_refused(chosen: Arm, judged: Sequence[Judged], contest: Contest) -> Iterator[str]:
    """Arms that keep more, and by which rule they are not chosen."""
    kept = kept_after_finetune(contest.arms, contest.harshest or "", contest.focus)
    for each in judged:
        if each.arm != chosen.name and each.holds is not True and each.arm in kept and chosen.name in kept:
            more = kept[each.arm].after.mean - kept[chosen.name].after.mean
            if more >= SAME:
                first = next(rule for rule in each.rules if rule.holds is each.holds)
                yield f"{each.arm} keeps {more:.2f} more. {_say_rule(first)}"
