"""Many seeds side by side: run folders -> sweep.json -> sweep.html. Intervals are over seeds and prompts, arms are paired by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from frpo.config import ConfigError
from frpo.records import Record
from frpo.report.data import Report, collect, reward_of

Doubles = NDArray[np.float64]
DRAWS = 4_000
CONFIDENCE = 0.95
NUM_KLS = 3
"""KLs inside the overlap of two methods at which they are compared."""


class Interval(Record):
    """A mean over seeds and prompts and its bootstrap interval."""

    mean: float
    lo: float
    hi: float

    @property
    def contains_zero(self) -> bool:
        return self.lo <= 0 <= self.hi


class ArmOverSeeds(Record):
    arm: str
    family: str
    """Method and penalty in words, the penalty's weight left out."""
    settings: str
    beta: float
    num_seeds: int
    kl: Interval
    """To the reference before downstream, nats per completion."""
    before: Interval
    """Reward on the focus task."""
    others: Interval | None
    """Mean reward on the other trained tasks, before downstream: what refusing everything would cost."""
    kept: dict[str, Interval]
    """Reward on the focus task after each downstream fine-tune."""
    certified: Interval | None
    """Within the radius nearest to 0.5 nats."""


class Difference(Record):
    """a - b, paired by seed, on the focus task."""

    downstream: str
    a: str
    b: str
    num_seeds: int
    kl: Interval
    """Difference of the KL to the reference."""
    kept: Interval
    corrected: Interval
    """The same at the confidence that holds for all comparisons of the table at once (Bonferroni)."""


class AtEqualKl(Record):
    """Two families compared on their curves of kept reward over KL, which the weight of the penalty draws."""

    downstream: str
    a: str
    b: str
    kl: float
    kept: Interval
    corrected: Interval


class Sweep(Record):
    name: str
    seeds: tuple[int, ...]
    focus: str
    headline: tuple[str, ...]
    arms: tuple[ArmOverSeeds, ...]
    differences: tuple[Difference, ...]
    equal_kl: tuple[AtEqualKl, ...]


class _Table:
    """Numbers of every arm, seed and prompt, and one set of bootstrap draws for all of them.

    A draw takes seeds with replacement, and prompts with replacement; every seed is measured on the same prompts, so the
    prompts of a draw are the same for all of its seeds. Its first row is the sample itself.
    """

    def __init__(self, reports: Sequence[Report], focus: str) -> None:
        self.reports, self.focus = reports, focus
        self.arms = [a.name for a in reports[0].arms]
        self.finetunes = sorted({d.task for d in reports[0].downstream})
        self.seeds = _shares(np.random.default_rng(0), len(reports))
        self.prompts: dict[int, Doubles] = {}

    def of(self, value: Callable[[Report, int], float | Sequence[float]]) -> Doubles:
        """[arms, seeds, prompts]; one prompt for what is no mean over prompts."""
        return np.array([[np.atleast_1d(value(r, i)) for r in self.reports] for i in range(len(self.arms))], dtype=np.float64)

    def draws(self, values: Doubles) -> Doubles:
        """values [..., seeds, prompts] -> means [..., 1 + DRAWS]"""
        size = values.shape[-1]
        if size not in self.prompts:
            self.prompts[size] = _shares(np.random.default_rng(size), size)
        return np.einsum("ds,...sp,dp->...d", self.seeds, values, self.prompts[size], optimize=True)

    def interval(self, values: Doubles, confidence: float = CONFIDENCE) -> Interval:
        """values [seeds, prompts]"""
        return interval_of(self.draws(values), confidence)


def _shares(rng: np.random.Generator, count: int) -> Doubles:
    """[1 + DRAWS, count]: how much of each draw an item makes up; the first row is the sample itself."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def interval_of(draws: Doubles, confidence: float) -> Interval:
    """Of the first draw, between quantiles of the others."""
    lo, hi = np.quantile(draws[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(draws[0]), lo=float(lo), hi=float(hi))


def _kept(finetune: str, task: str) -> Callable[[Report, int], list[float]]:
    """After a fine-tune, each prompt of a task; one whose rewards all failed counts as the mean."""

    def value(report: Report, arm: int) -> list[float]:
        found = next(k for k in report.arms[arm].kept if (k.downstream, k.task) == (finetune, task))
        return [found.after.mean if v is None else v for v in found.per_prompt]

    return value


def _kl(report: Report, arm: int) -> float:
    found = report.arms[arm].evaluation.kl_reference
    return found.mean if found else float("nan")


def gather(folder: Path) -> Sweep:
    """Read the finished seeds. Raises ConfigError when there is none."""
    runs = [p.parent for p in sorted(folder.glob("seed-*/report.json"))]
    if not runs:
        raise ConfigError(f"sweep: {folder} holds no finished seed")
    reports = [collect(r) for r in runs]
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    focuses = [r.focus for r in reports if r.focus]
    focus = max(sorted(set(focuses)), key=focuses.count) if focuses else reports[0].tasks[0]
    table = _Table(reports, focus)
    arms = _arms(table, config)
    differences, equal = _differences(table), _equal_kl(table, arms)
    return Sweep(
        name=config["name"],
        seeds=tuple(r.seed for r in reports),
        focus=focus,
        headline=_headline(table, differences, equal),
        arms=arms,
        differences=differences,
        equal_kl=equal,
    )


def _arms(table: _Table, config: dict[str, object]) -> tuple[ArmOverSeeds, ...]:
    specs = {a["name"]: a["objective"] for a in config["arms"]}  # type: ignore[attr-defined]
    before = table.of(lambda r, i: _reward(r, i, table.focus))
    kl = table.of(_kl)
    others = [t for t in table.reports[0].tasks if t != table.focus]
    other = table.of(lambda r, i: float(np.mean([_reward(r, i, t) for t in others]))) if others else None
    kept = {f: table.of(_kept(f, table.focus)) for f in table.finetunes}
    certified = table.of(_certified_at(table.focus))
    return tuple(
        ArmOverSeeds(
            arm=name,
            family=table.reports[0].arms[i].family,
            settings=table.reports[0].arms[i].settings,
            beta=float(specs[name]["beta"]),
            num_seeds=len(table.reports),
            kl=table.interval(kl[i]),
            before=table.interval(before[i]),
            others=table.interval(other[i]) if other is not None else None,
            kept={f: table.interval(v[i]) for f, v in kept.items()},
            certified=table.interval(certified[i]) if np.isfinite(certified[i]).all() else None,
        )
        for i, name in enumerate(table.arms)
    )


def _reward(report: Report, arm: int, task: str) -> float:
    found = reward_of(report.arms[arm].evaluation, task)
    return found.mean if found else float("nan")


def _certified_at(task: str, radius: float = 0.5) -> Callable[[Report, int], float]:
    def value(report: Report, arm: int) -> float:
        found = [r for r in report.robustness if (r.arm, r.task) == (report.arms[arm].name, task)]
        return min(zip(found[0].radii, found[0].certified, strict=True), key=lambda p: abs(p[0] - radius))[1] if found else float("nan")

    return value


def _differences(table: _Table) -> tuple[Difference, ...]:
    """Every later arm against the first."""
    kl = table.of(_kl)
    corrected = 1 - (1 - CONFIDENCE) / max(1, (len(table.arms) - 1) * len(table.finetunes))
    found = []
    for finetune in table.finetunes:
        kept = table.of(_kept(finetune, table.focus))
        for i in range(1, len(table.arms)):
            gap = kept[i] - kept[0]
            found.append(
                Difference(
                    downstream=finetune, a=table.arms[i], b=table.arms[0], num_seeds=len(table.reports), kl=table.interval(kl[i] - kl[0]),
                    kept=table.interval(gap), corrected=table.interval(gap, corrected),
                )
            )  # fmt: skip
    return tuple(found)


def _equal_kl(table: _Table, arms: Sequence[ArmOverSeeds]) -> tuple[AtEqualKl, ...]:
    """Every family of at least two weights against the first such family, where their mean curves overlap in KL.

    A curve is linear between the mean points (KL, kept reward) of its arms; each bootstrap draw draws both anew.
    """
    families: dict[str, list[int]] = {}
    for i, arm in enumerate(arms):
        families.setdefault(arm.family, []).append(i)
    curves = {f: rows for f, rows in families.items() if len(rows) >= 2}
    if len(curves) < 2:
        return ()
    kl = table.draws(table.of(_kl))
    first, *rest = curves
    comparisons = (len(curves) - 1) * NUM_KLS * len(table.finetunes)
    confidence = 1 - (1 - CONFIDENCE) / max(1, comparisons)
    found = []
    for finetune in table.finetunes:
        kept = table.draws(table.of(_kept(finetune, table.focus)))
        for other in rest:
            spans = [(kl[curves[f], 0].min(), kl[curves[f], 0].max()) for f in (first, other)]
            low, high = max(s[0] for s in spans), min(s[1] for s in spans)
            if low >= high:
                continue
            for at in np.linspace(low, high, NUM_KLS + 2)[1:-1]:
                gaps = _at(kl, kept, curves[other], at) - _at(kl, kept, curves[first], at)
                sure, corrected = interval_of(gaps, CONFIDENCE), interval_of(gaps, confidence)
                found.append(AtEqualKl(downstream=finetune, a=other, b=first, kl=float(at), kept=sure, corrected=corrected))
    return tuple(found)


def _at(kl: Doubles, kept: Doubles, arms: list[int], where: float) -> Doubles:
    """Kept reward at one KL on the curve of each draw; kl, kept [arms, draws]."""
    order = kl[arms].argsort(axis=0)
    x, y = np.take_along_axis(kl[arms], order, 0), np.take_along_axis(kept[arms], order, 0)
    return np.array([np.interp(where, x[:, d], y[:, d]) for d in range(x.shape[1])])


def _headline(table: _Table, differences: Sequence[Difference], equal: Sequence[AtEqualKl]) -> tuple[str, ...]:
    words = []
    for e in equal:
        sure = "the corrected interval contains 0" if e.corrected.contains_zero else "the corrected interval leaves 0 out"
        words.append(
            f"At equal KL {e.kl:.2f}, after {e.downstream}: {e.a} − {e.b} {e.kept.mean:+.3f} [{e.kept.lo:+.3f}, {e.kept.hi:+.3f}]; {sure}."
        )
    if not words:
        for d in differences:
            sure = "contains 0" if d.corrected.contains_zero else "leaves 0 out"
            words.append(
                f"After {d.downstream}: {d.a} − {d.b} {d.kept.mean:+.3f} [{d.kept.lo:+.3f}, {d.kept.hi:+.3f}], KL {d.kl.mean:+.2f}; "
                f"the corrected interval {sure}."
            )
    words.append(
        f"{len(table.reports)} seeds; reward on {table.focus} prompts; 95 % intervals by bootstrap over seeds and prompts, arms paired by both."
    )
    return tuple(words)
