"""The certificate's plane: what was certified, and where the measured fine-tunes and attacks lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from frpo.certificate import Point, reward_lower_bound, violates, worst_case_reward
from frpo.records import Certificate, Estimate, Evaluation, Record, StageResult


class Measured(Record):
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
    points: tuple[Measured, ...]

    @property
    def num_inside(self) -> int:
        """Of the fine-tunes, attacks left out."""
        return sum(bool(p.inside) for p in self.fine_tunes)

    @property
    def fine_tunes(self) -> tuple[Measured, ...]:
        return tuple(p for p in self.points if not p.attack)

    @property
    def num_below(self) -> int:
        return sum(p.below for p in self.points)


def robustness(arm: str, results: dict[str, StageResult]) -> tuple[Robustness, ...]:
    """What is known of one arm, a record per certified task; empty without a certify stage."""
    stage = results.get(f"certify/{arm}")
    measured = [
        (name, kind == "attack", e)
        for stage_name, result in results.items()
        if stage_name.count("/") == 2
        for kind, owner, name in [stage_name.split("/")]
        if owner == arm
        for e in result.evaluations
        if e.step > 0
    ]
    return tuple(_of_task(arm, c, measured) for c in (stage.certificates if stage else ()))


def _of_task(arm: str, found: Certificate, measured: list[tuple[str, bool, Evaluation]]) -> Robustness:
    rewards = np.array(found.rewards)
    points = []
    for name, attack, evaluation in measured:
        task = next((t for t in evaluation.rewards if t.task == found.task), None)
        if task is None or task.kl_policy is None:
            continue
        kl, reward = task.kl_policy, task.reward
        points.append(
            Measured(
                name=f"attack {name}" if attack else name,
                attack=attack,
                step=evaluation.step,
                kl=kl,
                reward=reward,
                inside=None if found.radius is None else kl.mean <= found.radius,
                certified=_certified(found, rewards, kl),
                plug_in=worst_case_reward(rewards, max(0.0, kl.mean)),
                below=_below(found, rewards, kl, reward),
            )
        )
    return Robustness(
        arm=arm,
        task=found.task,
        radius=found.radius,
        floor=found.floor,
        confidence=found.confidence,
        num_prompts=rewards.shape[0],
        num_completions=rewards.shape[1],
        radii=found.radii,
        plug_in=found.plug_in,
        lo=found.lo,
        hi=found.hi,
        certified=found.certified,
        points=tuple(points),
    )


def _certified(found: Certificate, rewards: NDArray[np.float64], kl: Estimate) -> float:
    """At the upper 95 % limit of a KL: the floor where a single prompt gives no limit."""
    if kl.half is None:
        return found.floor
    return reward_lower_bound(
        rewards, max(0.0, kl.mean + kl.half), floor=found.floor, confidence=found.confidence
    )


def _below(found: Certificate, rewards: NDArray[np.float64], kl: Estimate, reward: Estimate) -> bool:
    """Whether a policy violates the certificate: a single prompt proves nothing."""
    if kl.se is None or reward.se is None:
        return False
    return violates(
        Point(kl.mean, kl.se, reward.mean, reward.se), rewards, floor=found.floor, confidence=found.confidence
    )


def sentences(found: tuple[Robustness, ...], task: str | None) -> tuple[str, ...]:
    """The certificate and its coverage in words, for one task."""
    mine = [r for r in found if r.task == task]
    if not mine:
        return ()
    at = min(range(len(mine[0].radii)), key=lambda i: abs(mine[0].radii[i] - 0.5))
    floors = "; ".join(f"{r.arm} {r.certified[at]:.2f} (plug-in {r.plug_in[at]:.2f})" for r in mine)
    words = [f"Certified reward on {task} prompts within {mine[0].radii[at]:g} nats, 95 %: {floors}."]
    coverage = "; ".join(
        f"{r.arm} {r.num_inside} of {len(r.fine_tunes)} within its {r.radius:.2f} nats"
        for r in mine
        if r.radius is not None
    )
    below = sum(r.num_below for r in mine)
    total = sum(len(r.points) for r in mine)
    if total:
        said = (
            f"{below} of {total} measured policies lie"
            if below != 1
            else f"1 of {total} measured policies lies"
        )
        words.append(
            f"{'Coverage: ' + coverage + '. ' if coverage else ''}{said} below what was certified at their "
            "own KL."
        )
    return tuple(words)
