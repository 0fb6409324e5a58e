"""The schema of report.json."""

from __future__ import annotations

from typing import Literal

from frpo.records import ArmSummary, BenchmarkScore, Estimate, Evaluation, Maybe, Record
from frpo.report.frontier import FrontierPoint
from frpo.report.robustness import Robustness
from frpo.report.student import Difference
from frpo.report.timeline import Timeline


class Kept(Record):
    """What one arm has left on one task after one downstream fine-tune."""

    downstream: str
    task: str
    before: Estimate
    after: Estimate
    per_prompt: tuple[float | None, ...]
    """Afterwards, each held-out prompt of the task."""


class Arm(Record):
    name: str
    settings: str
    """Objective in words."""
    family: str
    """The same without the penalty's weight: what stands on one curve over KL."""
    penalty: str
    beta: float
    """Of the penalty; where it is steered, the weight it began with."""
    target_kl: float | None
    """The KL that the weight is steered to."""
    lam: float | None
    """For FRPO with a given lambda."""
    evaluation: Evaluation
    """Of the policy before any downstream task."""
    summary: ArmSummary
    kept: tuple[Kept, ...]


class Downstream(Record):
    """One arm through one downstream fine-tune."""

    arm: str
    task: str
    evaluations: tuple[Evaluation, ...]


class Benchmarks(Record):
    """What lm-evaluation-harness measured of one policy."""

    policy: str
    """base, an arm, or an arm and the downstream task after which it was measured."""
    scores: tuple[BenchmarkScore, ...]


class TrainingCurves(Record):
    """Curves of one arm's rlhf stage, one value per step."""

    arm: str
    steps: tuple[int, ...]
    reward: tuple[Maybe, ...]
    kl: tuple[Maybe, ...]
    entropy: tuple[Maybe, ...]
    length: tuple[Maybe, ...]
    equal_groups: tuple[Maybe, ...]


class Paid(Record):
    """Difference of reward between two arms on a task that is not in question, as a KeptDifference has it."""

    task: str
    before: Difference
    """Any fine-tune."""
    after: Difference
    """The same fine-tune."""


class KeptDifference(Record):
    """Difference of kept reward between two arms of this run, interval over prompts, paired by prompt (95 %,
    one seed)."""

    downstream: str
    task: str
    a: str
    b: str
    gained: Difference
    """Reward of a less that of b, afterwards."""
    paid: tuple[Paid, ...]
    """The same on each other task."""
    alike: bool
    """Whether one kind of penalty trained both: KLs of unlike ones do not mean the same."""
    kl_a: float | None
    kl_b: float | None


Decision = Literal["ship", "don't ship", "can't tell"]


class Rule(Record):
    """What an arm must do to be shipped, and whether it does."""

    name: str
    """Of `Verdict.rules`."""
    holds: bool | None
    """None: it was not measured, or the held-out prompts are too few to tell."""
    figures: str
    remedy: str = ""
    """What to do where it does not hold or is not known."""


class Judged(Record):
    arm: str
    rules: tuple[Rule, ...]

    @property
    def holds(self) -> bool | None:
        """False for one rule that does not hold, else None for one that is not known, else True."""
        held = [rule.holds for rule in self.rules]
        return min(held, key=(False, None, True).index)


class Verdict(Record):
    """Which arm to ship. It speaks of the policies of this run, not of the methods that made them."""

    decision: Decision
    """ship: an arm fulfils every rule. don't ship: each arm fails at least one. can't tell: otherwise."""
    arm: str
    """Of the arms that stand best by the rules, the one that kept most after the fine-tune that cost most."""
    why: tuple[str, ...]
    """Sentences."""
    policy: str
    """Its folder."""
    load: str
    """Python that loads it."""
    rules: dict[str, str]
    """What each rule asks for."""
    judged: tuple[Judged, ...]


class Answer(Record):
    arm: str
    """Or base."""
    downstream: str | None
    """The fine-tune that it is after; None before any."""
    completion: str
    reward: float | None


class AnsweredPrompt(Record):
    task: str
    prompt: str
    completions: tuple[Answer, ...]


class Report(Record):
    name: str
    seed: int
    verdict: Verdict | None
    """None where no arm is trained."""
    reward: str
    """What the reward is, and how much of it the base policy has, in a sentence."""
    headline: tuple[str, ...]
    """Sentences; without a verdict the first is the answer."""
    warnings: tuple[str, ...]
    """Stages that learnt little, and what to change, a line per stage and cause."""
    focus: str | None
    """Task of the rlhf stage that lost most downstream, mean over arms."""
    tasks: tuple[str, ...]
    """Tasks of the rlhf stage."""
    base: Evaluation | None
    arms: tuple[Arm, ...]
    downstream: tuple[Downstream, ...]
    comparisons: tuple[KeptDifference, ...]
    zero_line: float | None
    """Largest KL, nats, of an arm's policy measured against itself, where a fine-tune of it begins: what is
    nearer to 0 is no distance."""
    frontier: tuple[FrontierPoint, ...]
    """What each fine-tune learned and left; empty without held-out downstream examples."""
    robustness: tuple[Robustness, ...]
    """Certificate and measured policies of each arm and task; empty without a certify stage."""
    benchmarks: tuple[Benchmarks, ...]
    """Empty without a harness stage."""
    training: tuple[TrainingCurves, ...]
    timeline: Timeline | None
    """Of the first arm."""
    prompts: tuple[AnsweredPrompt, ...]
    seconds: dict[str, float]
    """Of each stage."""
    config: str
    """YAML"""
    versions: dict[str, str]
    command: str
