"""The certificate's plane over several seeds, and where their fine-tunes and attacks lie on it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from frpo.records import Record
from frpo.report.bootstrap import Interval, Table


class PolicyOverSeeds(Record):
    """A fine-tune or attack after so many steps; the reward is on the focus task."""

    name: str
    attack: bool
    step: int
    kl: Interval
    """KL(Q || the arm's policy), nats per completion."""
    reward: Interval
    certified: Interval
    """Lower bound at the upper 95 % limit of its KL."""
    plug_in: Interval
    """Plug-in estimate at its KL."""


class Coverage(Record):
    """The certificate's plane of the focus task, and where the measured policies of all seeds lie on it."""

    radii: tuple[float, ...]
    certified: tuple[float, ...]
    """At each radius, mean over seeds."""
    plug_in: tuple[float, ...]
    policies: tuple[PolicyOverSeeds, ...]

    fine_tunes: int
    inside: int | None
    """Of the fine-tunes, those within the arm's radius; None for an arm without one."""
    attacks: int
    below: int
    """Of all, those whose reward's upper limit lies below what was certified at their KL."""
    above_certified: Interval | None
    """Reward of fine-tunes minus what was certified at their KL."""
    attack_above_certified: Interval | None


def coverage_of(table: Table, arm: str) -> Coverage | None:
    """On the focus task; None where not every seed of the arm was certified."""
    runs = [
        found
        for r in table.reports
        if (found := next((x for x in r.robustness if (x.arm, x.task) == (arm, table.focus)), None))
    ]
    if len(runs) < len(table.reports):
        return None

    def over_seeds(values: Iterable[float]) -> Interval:
        return table.interval(np.array([[v] for v in values]))

    def above(attack: bool) -> Interval | None:
        gaps = [[p.reward.mean - p.certified for p in r.points if p.attack == attack] for r in runs]
        return over_seeds(float(np.mean(g)) for g in gaps) if all(gaps) else None

    policies = [
        PolicyOverSeeds(
            name=ps[0].name,
            attack=ps[0].attack,
            step=ps[0].step,
            kl=over_seeds(p.kl.mean for p in ps),
            reward=over_seeds(p.reward.mean for p in ps),
            certified=over_seeds(p.certified for p in ps),
            plug_in=over_seeds(p.plug_in for p in ps),
        )
        for ps in zip(*(r.points for r in runs), strict=True)
    ]
    return Coverage(
        radii=runs[0].radii,
        certified=tuple(np.mean([r.certified for r in runs], axis=0)),
        plug_in=tuple(np.mean([r.plug_in for r in runs], axis=0)),
        policies=tuple(policies),
        fine_tunes=sum(len(r.fine_tunes) for r in runs),
        inside=None if runs[0].radius is None else sum(r.num_inside for r in runs),
        attacks=sum(len(r.points) - len(r.fine_tunes) for r in runs),
        below=sum(r.num_below for r in runs),
        above_certified=above(attack=False),
        attack_above_certified=above(attack=True),
    )
