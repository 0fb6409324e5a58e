"""The certificate's plane: what was certified, and where the measured fine-tunes and attacks lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from frpo.certificate import reward_lower_bounds, worst_case_reward
from frpo.outline.stage import parse_stage
from frpo.records import Certificate, Estimate, Evaluation, Record, StageResult
from frpo.report.lookup import nearest, task_measured


class MeasuredPolicy(Record):
    """One fine-tuned policy Q, on the prompts of one task."""

    name: str
    """Downstream task or attack."""
    attack: bool
    step: int
    kl: Estimate
    """KL(Q || the arm's policy), nats per completion."""
    reward: Estimate
    inside: bool | None
    """Whether its KL is within the arm's radius; None for an arm without one."""
    certified: float
    """Lower bound at the upper 95 % limit of its KL."""
    plug_in: float
    """Plug-in estimate at its KL."""
    below: bool
    """Whether the upper limit of its reward lies below `certified`: a violation."""


class Robustness(Record):
    """One arm on one task."""

    arm: str
    task: str
    radius: float | None
    """Nats that the arm was trained for; None for methods without a radius."""
    floor: float
    confidence: float
    num_prompts: int
    num_completions: int
    """Per prompt."""
    radii: tuple[float, ...]
    plug_in: tuple[float, ...]
    lo: tuple[float, ...]
    hi: tuple[float, ...]
    certified: tuple[float, ...]
    points: tuple[MeasuredPolicy, ...]

    @property
    def num_inside(self) -> int:
        """Of the fine-tunes, attacks left out."""
        return sum(bool(p.inside) for p in self.fine_tunes)

    @property
    def fine_tunes(self) -> tuple[MeasuredPolicy, ...]:
        return tuple(p for p in self.points if not p.attack)

    @property
    def num_attacks(self) -> int:
        return len(self.points) - len(self.fine_tunes)

    @property
    def num_below(self) -> int:
        return sum(p.below for p in self.points)


@dataclass(frozen=True)
class Fate:
    """What became of an arm's policy in a downstream fine-tune or attack, at one step of it."""

    name: str
    attack: bool
    evaluation: Evaluation


def planes_of(arm: str, results: dict[str, StageResult]) -> tuple[Robustness, ...]:
    """What is known of one arm, a record per certified task; empty without a certify stage."""
    stage = results.get(f"certify/{arm}")
    if stage is None:
        return ()
    fates = list(_fates_of(arm, results))
    return tuple(_plane_of(arm, certificate, fates) for certificate in stage.certificates)


def _fates_of(arm: str, results: dict[str, StageResult]) -> Iterator[Fate]:
    """Stages of three parts, kind/arm/name, are those that change a policy."""
    for stage, result in results.items():
        name = parse_stage(stage)
        if name.arm != arm or not name.rest:
            continue
        for evaluation in result.evaluations:
            if evaluation.step > 0:
                yield Fate(name.rest, name.kind == "attack", evaluation)


def _plane_of(arm: str, certificate: Certificate, fates: Sequence[Fate]) -> Robustness:
    rewards = np.array(certificate.rewards)
    return Robustness(
        arm=arm,
        task=certificate.task,
        radius=certificate.radius,
        floor=certificate.floor,
        confidence=certificate.confidence,
        num_prompts=rewards.shape[0],
        num_completions=rewards.shape[1],
        radii=certificate.radii,
        plug_in=certificate.plug_in,
        lo=certificate.lo,
        hi=certificate.hi,
        certified=certificate.certified,
        points=tuple(measure_fates(certificate, fates)),
    )


def measure_fates(certificate: Certificate, fates: Sequence[Fate]) -> Iterator[MeasuredPolicy]:
    """Those whose reward and KL on the certificate's task were measured."""
    rewards = np.array(certificate.rewards)
    rows = list(_read_fates(certificate.task, fates))
    limits = [max(0.0, kl.mean + (kl.half or 0.0)) for _, kl, _ in rows]
    bounds = reward_lower_bounds(rewards, limits, floor=certificate.floor, confidence=certificate.confidence)
    for (fate, kl, reward), bound in zip(rows, bounds, strict=True):
        # a single prompt gives its KL no upper limit
        certified = certificate.floor if kl.half is None else float(bound)
        yield MeasuredPolicy(
            name=f"attack {fate.name}" if fate.attack else fate.name,
            attack=fate.attack,
            step=fate.evaluation.step,
            kl=kl,
            reward=reward,
            inside=None if certificate.radius is None else kl.mean <= certificate.radius,
            certified=certified,
            plug_in=worst_case_reward(rewards, max(0.0, kl.mean)),
            below=reward.half is not None and reward.mean + reward.half < certified,
        )


def _read_fates(task: str, fates: Sequence[Fate]) -> Iterator[tuple[Fate, Estimate, Estimate]]:
    """Each with KL(Q || the arm's policy) and the reward on a task, where both were measured."""
    for fate in fates:
        measured = task_measured(fate.evaluation, task)
        if measured is not None and measured.kl_policy is not None:
            yield fate, measured.kl_policy, measured.reward


def describe_planes(planes: Sequence[Robustness], task: str | None) -> Iterator[str]:
    """The certificate and its coverage in words, for one task."""
    mine = [plane for plane in planes if plane.task == task]
    if not mine:
        return
    radius = nearest(mine[0].radii, mine[0].radii, 0.5)
    at = mine[0].radii.index(radius)
    floors = "; ".join(
        f"{plane.arm} {plane.certified[at]:.2f} (plug-in {plane.plug_in[at]:.2f})" for plane in mine
    )
    yield f"Certified reward on {task} prompts within {radius:g} nats, 95 %: {floors}."
    total = sum(len(plane.points) for plane in mine)
    if total:
        violations = _violations_in_words(mine, total)
        yield f"{_coverage_in_words(mine)}{violations} what was certified at their own KL."


def _coverage_in_words(planes: Sequence[Robustness]) -> str:
    words = []
    for plane in planes:
        if plane.radius is not None:
            inside = f"{plane.num_inside} of {len(plane.fine_tunes)}"
            words.append(f"{plane.arm} {inside} within its {plane.radius:.2f} nats")
    return f"Coverage: {'; '.join(words)}. " if words else ""


def _violations_in_words(planes: Sequence[Robustness], total: int) -> str:
    below = sum(plane.num_below for plane in planes)
    if below == 1:
        return f"1 of {total} measured policies lies below"
    return f"{below} of {total} measured policies lie below"
