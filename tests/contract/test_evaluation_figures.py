"""The figures of an evaluation and of a certificate: by hand, or within what theory says of the draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from frpo.config import CertifyConfig, FrpoEstimator, GrpoEstimator, ObjectiveConfig, RlooEstimator
from frpo.evaluation import (
    Against,
    Draws,
    Label,
    Measurers,
    estimate_mean,
    evaluate,
    make_certificate,
    make_certificates,
)
from frpo.records import Estimate, Evaluation
from frpo.stops import RunStopped
from frpo.types import Completion, Floats, Group, Prompt, Reward, Sampling
from tests.support.fakes import ANSWERS, FakeEngine, FakeLearner, FakeRewards, Now, config

TABLE = (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)
REFERENCE, POLICY = Path("reference"), Path("policy")


class Recorded(FakeEngine):
    """Draws from known probabilities, and keeps what it was asked."""

    def __init__(self, logits: torch.Tensor | None = None, version: int = 0) -> None:
        super().__init__()
        self.logits = torch.linspace(1.0, -1.0, ANSWERS) if logits is None else logits
        self.version = version
        self.seeds: list[int] = []
        self.sampling: list[Sampling] = []

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
    ) -> Iterator[Group]:
        self.seeds += seeds
        self.sampling.append(sampling)
        yield from super().generate(prompts, seeds, sampling, policy_version)

    @property
    def probabilities(self) -> np.ndarray:
        probabilities: np.ndarray = torch.softmax(self.logits.double(), 0).numpy()
        return probabilities


class Fixed(FakeEngine):
    """Gives the completions that were laid down for each prompt, the last prompt first."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__()
        self.groups = groups

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, policy_version: int
    ) -> Iterator[Group]:
        yield from reversed(self.groups)


class ById:
    """Rewards by the first token of the completion."""

    def __init__(self, rewards: dict[int, Reward]) -> None:
        self.rewards = rewards

    def score(self, group: Group) -> Now:
        return Now(tuple(self.rewards[int(c.token_ids[0])] for c in group.completions))


class Saved:
    """Scorer of saved policies, each with one log-prob for every token."""

    def __init__(self, **logprob: float) -> None:
        self.logprob = logprob

    def submit(self, policy: Path, groups: Sequence[Group]) -> Now:
        value = self.logprob[policy.name]
        return Now(
            [tuple(np.full(len(c.token_ids), value, np.float32) for c in g.completions) for g in groups]
        )


class InTraining:
    """Trainer: log-prob -0.5 for every token."""

    def submit(self, groups: Sequence[Group]) -> Now:
        rows: list[tuple[Floats, ...]] = [
            tuple(np.full(len(c.token_ids), -0.5, np.float32) for c in g.completions) for g in groups
        ]
        return Now(rows)


def measured(
    engine: Any, rewards: Any, trainer: Any, scorer: Any, prompts: Sequence[Prompt], **given: Any
) -> Evaluation:
    """`given` are fields of Draws, Against and Label."""
    settings = {"seed": 1, "completions": 4, "max_new_tokens": 1, "tasks": {"a"}, "arm": "arm", **given}
    asked = [
        kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})
        for kind in (Draws, Against, Label)
    ]
    return evaluate(Measurers(engine, rewards, trainer, scorer), prompts, *asked)


def prompts_of(tasks: str) -> list[Prompt]:
    return [Prompt(f"p:{i}", f"prompt {i}", np.array([9, i], np.int32), t, {}) for i, t in enumerate(tasks)]


def test_a_standard_error_is_the_deviation_over_the_root_of_how_many() -> None:
    for values in ([0.0, 1.0], [0.1, 0.5, 0.9, 0.2], [float(i % 7) for i in range(50)]):
        estimated = estimate_mean(values)
        assert estimated.mean == pytest.approx(mean(values))
        assert estimated.se == pytest.approx(stdev(values) / len(values) ** 0.5)
    assert estimate_mean([0.3]) == Estimate(mean=0.3, se=None)


def test_reward_and_kl_are_those_of_the_policy_and_their_errors_those_of_the_draws() -> None:
    """Of n prompts with k draws each, the mean has the error sqrt(variance / (n k)); what is told of that
    error is known to 1 / sqrt(2 (n - 1))."""
    n, k = 200, 32
    engine = Recorded()
    learner = FakeLearner(ObjectiveConfig())
    learner.logits = engine.logits
    evaluation = measured(
        engine,
        FakeRewards(TABLE),
        learner,
        Saved(reference=-np.log(ANSWERS)),
        prompts_of("ab" * n),
        completions=k,
        reference=REFERENCE,
    )
    p = engine.probabilities
    for values, estimates in (
        (np.array(TABLE), [task.reward for task in evaluation.rewards]),
        (np.log(p * ANSWERS), [task.kl_reference for task in evaluation.rewards]),
    ):
        error = ((p @ values**2 - (p @ values) ** 2) / (n * k)) ** 0.5
        for each in estimates:
            assert each is not None
            assert each.mean == pytest.approx(p @ values, abs=4 * error)
            assert each.se == pytest.approx(error, rel=4 / (2 * (n - 1)) ** 0.5)


def group(index: int, prompt: Prompt, *lengths: int, cut: int = 0) -> Group:
    """Completion j has the token 10 index + j, `lengths[j]` times; the first `cut` of them are cut."""
    completions = tuple(
        Completion(
            np.full(length, 10 * index + j, np.int32),
            np.zeros(length, np.float32),
            np.zeros(length, np.int32),
            f"answer {index}.{j}",
            "length" if j < cut else "stop",
        )
        for j, length in enumerate(lengths)
    )
    return Group(index, prompt, completions)


PROMPTS = prompts_of("bab")
GROUPS = (
    group(0, PROMPTS[0], 1, 3, cut=1),
    group(1, PROMPTS[1], 2, 2),
    group(2, PROMPTS[2], 8, 4, cut=1),
)
REWARDS = {
    0: Reward(0.2, {"good": 0.4, "short": 1.0}),
    1: Reward(0.4, {"good": 0.8, "short": 0.0}),
    10: Reward(None, {"good": None, "short": 0.5}, "no judge"),
    11: Reward(0.7, {"good": 1.0}),
    20: Reward(1.0, {"good": 0.0}),
    21: Reward(None, {"good": None}, "no judge"),
}


def by_hand(**given: Any) -> Evaluation:
    scorer = Saved(reference=-2.0, policy=-0.75)
    return measured(Fixed(GROUPS), ById(REWARDS), InTraining(), scorer, PROMPTS, **given)


def test_each_task_has_the_mean_over_prompts_of_the_rewards_that_it_has() -> None:
    a, b = by_hand().rewards
    assert (a.task, b.task) == ("a", "b")
    assert (a.reward.mean, a.reward.se) == (pytest.approx(0.7), None)
    assert (a.num_prompts, a.num_completions, a.failed, a.per_prompt) == (1, 2, 1, (0.7,))
    assert b.reward.mean == pytest.approx(mean([0.3, 1.0]))
    assert b.reward.se == pytest.approx(stdev([0.3, 1.0]) / 2**0.5)
    assert (b.num_prompts, b.num_completions, b.failed) == (2, 4, 1)
    assert b.per_prompt == pytest.approx((0.3, 1.0))
    assert a.parts == pytest.approx({"good": 1.0, "short": 0.5})
    assert b.parts == pytest.approx({"good": 0.4, "short": 0.5})


def test_a_prompt_without_any_reward_is_left_out_of_the_mean_and_stands_as_none() -> None:
    failed = {**REWARDS, 0: Reward(None, {}, "no judge"), 1: Reward(None, {}, "no judge")}
    _, b = measured(Fixed(GROUPS), ById(failed), None, None, PROMPTS).rewards
    assert (b.reward.mean, b.reward.se, b.failed, b.num_prompts) == (1.0, None, 3, 2)
    assert b.per_prompt == (None, 1.0)


def test_lengths_are_the_mean_and_cuts_the_share_of_all_completions() -> None:
    evaluation = by_hand()
    assert evaluation.length == pytest.approx(20 / 6)
    assert evaluation.cut_share == pytest.approx(2 / 6)


def test_each_kl_is_to_the_policy_that_it_names_and_adds_up_the_tokens() -> None:
    evaluation = by_hand(reference=REFERENCE, policy=POLICY, tasks={"b"})
    tokens = {"a": [2], "b": [2, 6]}  # mean length of each prompt's completions
    for task in evaluation.rewards:
        assert task.kl_reference is not None
        assert task.kl_policy is not None
        assert task.kl_reference.mean == pytest.approx(1.5 * mean(tokens[task.task]))
        assert task.kl_policy.mean == pytest.approx(0.25 * mean(tokens[task.task]))
    assert evaluation.rewards[1].kl_reference == evaluation.kl_reference
    assert evaluation.rewards[1].kl_policy == evaluation.kl_policy
    assert evaluation.kl_policy is not None
    assert evaluation.kl_policy.se == pytest.approx(0.25 * stdev([2, 6]) / 2**0.5)


def test_a_kl_that_was_not_asked_for_is_none() -> None:
    one = by_hand(policy=POLICY)
    assert (one.kl_reference, one.rewards[0].kl_reference) == (None, None)
    assert one.kl_policy is not None
    assert by_hand(policy=POLICY, tasks={"other"}).kl_policy is None
    neither = by_hand()
    assert (neither.kl_reference, neither.kl_policy) == (None, None)
    for trainer, scorer in ((None, None), (InTraining(), None), (None, Saved(reference=-2.0))):
        without = measured(Fixed(GROUPS), ById(REWARDS), trainer, scorer, PROMPTS, reference=REFERENCE)
        assert without.kl_reference is None


def test_a_kl_that_is_no_number_is_called_by_its_name() -> None:
    for name, said in (("reference", "the KL to the reference"), ("policy", "the KL to the arm's policy")):
        scorer = Saved(**{name: float("nan")})
        with pytest.raises(RunStopped, match=f"^evaluation of arm after crafts at step 0: {said} is nan: "):
            measured(
                Fixed(GROUPS),
                ById(REWARDS),
                InTraining(),
                scorer,
                PROMPTS,
                downstream="crafts",
                **{name: Path(name)},
            )


@pytest.mark.parametrize(
    ("errors", "said"),
    [((None, None), "no reason was given"), (("no judge", "no key"), "no judge; no key")],
)
def test_a_task_whose_rewards_all_failed_is_told_with_every_reason(
    errors: tuple[str | None, str | None], said: str
) -> None:
    failed = {**REWARDS, 10: Reward(None, {}, errors[0]), 11: Reward(None, {}, errors[1])}
    with pytest.raises(RunStopped, match=f"all 2 rewards of task 'a' failed: {said}$"):
        measured(Fixed(GROUPS), ById(failed), None, None, PROMPTS)


def test_an_evaluation_says_whose_it_is() -> None:
    evaluation = by_hand(arm="frpo", downstream="crafts", step=7, downstream_loss=0.25)
    assert (evaluation.arm, evaluation.downstream, evaluation.step, evaluation.downstream_loss) == (
        "frpo",
        "crafts",
        7,
        0.25,
    )
    assert 0 <= evaluation.seconds < 60


def test_samples_are_first_completions_of_prompts_evenly_apart() -> None:
    assert by_hand().samples == ()
    (sample,) = by_hand(num_samples=1).samples
    assert (sample.task, sample.prompt, sample.completion, sample.reward) == (
        "b",
        "prompt 0",
        "answer 0.0",
        0.2,
    )
    assert [s.prompt for s in by_hand(num_samples=2).samples] == ["prompt 0", "prompt 1"]
    assert [s.reward for s in by_hand(num_samples=3).samples] == [0.2, None, 1.0]
    engine = Recorded()
    many = measured(engine, FakeRewards(TABLE), None, None, prompts_of("a" * 12), num_samples=3)
    assert [s.prompt for s in many.samples] == ["prompt 0", "prompt 4", "prompt 8"]


def seed_of(text: str) -> int:
    """Of a run's seed, a purpose and a prompt: the same for ever, so that a report can be made again."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 17 << 16


def test_every_policy_is_measured_on_the_same_draws() -> None:
    first, later = Recorded(), Recorded(version=9)
    for engine in (first, later):
        measured(engine, FakeRewards(TABLE), None, None, prompts_of("abab"), version=engine.version)
    assert first.seeds == later.seeds
    assert len(set(first.seeds)) == 4
    other = Recorded()
    measured(other, FakeRewards(TABLE), None, None, prompts_of("abab"), seed=2)
    assert not set(other.seeds) & set(first.seeds)
    reordered = Recorded()
    measured(reordered, FakeRewards(TABLE), None, None, prompts_of("abab")[::-1])
    assert reordered.seeds == first.seeds[::-1]
    assert first.seeds[2] == seed_of("1/evaluate/p:2")


def test_an_evaluation_draws_from_the_policy_itself() -> None:
    engine = Recorded()
    given = {"completions": 3, "max_new_tokens": 5, "stop": ("###",)}
    measured(engine, FakeRewards(TABLE), None, None, prompts_of("a"), **given)
    assert engine.sampling == [Sampling(3, 5, temperature=1.0, top_p=1.0, stop=("###",))]


def certifying(**fields: Any) -> Any:
    cfg = config()
    rollout = cfg.rollout.model_copy(
        update={"temperature": 0.5, "top_p": 0.8, "stop": ("###",), "max_new_tokens": 3}
    )
    section = CertifyConfig.model_validate({"completions_per_prompt": 16, "radii": (0.1, 0.5), **fields})
    return cfg.model_copy(update={"certify": section, "rollout": rollout})


def test_a_certificate_has_draws_of_its_own_at_temperature_one() -> None:
    engine, cfg = Recorded(), certifying()
    make_certificates(engine, FakeRewards(TABLE), prompts_of("abab"), cfg, None)
    assert engine.sampling == [Sampling(16, 3, temperature=1.0, top_p=1.0, stop=("###",))]
    evaluated = Recorded()
    measured(evaluated, FakeRewards(TABLE), None, None, prompts_of("abab"), seed=cfg.seed)
    assert len(set(engine.seeds)) == 4
    assert engine.seeds[3] == seed_of("7/certify/p:3")
    assert not set(engine.seeds) & set(evaluated.seeds)
    again, other = Recorded(), Recorded()
    make_certificates(again, FakeRewards(TABLE), prompts_of("abab"), cfg, None)
    make_certificates(other, FakeRewards(TABLE), prompts_of("abab"), cfg.model_copy(update={"seed": 8}), None)
    assert again.seeds == engine.seeds
    assert not set(other.seeds) & set(engine.seeds)


def test_a_certificate_holds_the_rewards_of_its_task_by_prompt() -> None:
    cfg, objective = certifying(floor=0.1), ObjectiveConfig(estimator=FrpoEstimator(lam=0.5))
    made = make_certificates(Fixed(GROUPS), ById(REWARDS), PROMPTS, cfg, objective)
    assert [(c.task, c.failed, c.rewards) for c in made] == [
        ("a", 1, ((0.1, 0.7),)),
        ("b", 1, ((0.2, 0.4), (1.0, 0.1))),
    ]
    of_b = [[REWARDS[0], REWARDS[1]], [REWARDS[20], REWARDS[21]]]
    assert made[1] == make_certificate("b", of_b, cfg.certify, objective, cfg.seed)
    assert made[1].radius is not None


def test_the_interval_of_a_certificate_is_resampled_by_the_runs_seed() -> None:
    cfg = certifying()
    (made,) = make_certificates(Recorded(), FakeRewards(TABLE), prompts_of("a" * 20), cfg, None)
    scored = [[Reward(value, {}) for value in row] for row in made.rewards]
    assert made == make_certificate("a", scored, cfg.certify, None, 7)
    assert made != make_certificate("a", scored, cfg.certify, None, 8)


def test_a_certificate_says_what_it_stands_on() -> None:
    scored = [[Reward(r, {}) for r in row] for row in ((1.0, 0.0, 0.5, 0.5), (0.25, 1.0, 0.75, 1.0))]
    settings = CertifyConfig(floor=-1.0, radii=(0.125, 0.25))
    objective = ObjectiveConfig(estimator=FrpoEstimator(lam=0.5))
    made = make_certificate("t", scored, settings, objective, 3)
    assert (made.task, made.floor, made.confidence, made.radii) == ("t", -1.0, 0.95, (0.125, 0.25))
    assert made.failed == 0
    assert made.radius is not None
    divergences = []
    for row in ((1.0, 0.0, 0.5, 0.5), (0.25, 1.0, 0.75, 1.0)):
        weights = np.exp(-np.array(row) / 0.5)
        p = weights / weights.sum()
        divergences.append(float((p * np.log(4 * p)).sum()))
    assert made.radius == pytest.approx(mean(divergences))
    assert (
        make_certificate("t", scored, settings, ObjectiveConfig(estimator=RlooEstimator()), 3).radius is None
    )


def test_each_bound_of_a_certificate_is_an_end_of_its_interval() -> None:
    rng = np.random.default_rng(0)
    scored = [[Reward(float(r), {}) for r in row] for row in rng.random((10, 32))]
    made = make_certificate("t", scored, CertifyConfig(radii=(0.1, 0.5)), None, 0)
    for lo, plug_in, hi, certified in zip(made.lo, made.plug_in, made.hi, made.certified, strict=True):
        assert 0 < certified < plug_in  # of these prompts; the interval is of others too
        assert lo < plug_in < hi + 0.02
        assert hi < 1
    other = make_certificate("t", scored, CertifyConfig(radii=(0.1, 0.5)), None, 1)
    assert (other.certified, other.plug_in) == (made.certified, made.plug_in)
    assert other.lo != made.lo  # its resampling has the run's seed


def test_only_the_arms_own_radius_stands_on_the_legend() -> None:
    scored = [[Reward(r, {}) for r in (1.0, 0.0)]]
    settings = CertifyConfig(radii=(0.1,))
    assert (
        make_certificate("t", scored, settings, ObjectiveConfig(estimator=FrpoEstimator(rho=0.3)), 0).radius
        == 0.3
    )
    assert (
        make_certificate("t", scored, settings, ObjectiveConfig(estimator=GrpoEstimator()), 0).radius is None
    )
    assert make_certificate("t", scored, settings, None, 0).radius is None
