"""Many seeds side by side: run folders -> sweep.json -> sweep.html. Intervals are over seeds, arms are paired by seed."""

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
DRAWS = 10_000
CONFIDENCE = 0.95
NUM_KLS = 3
"""KLs inside the overlap of two methods at which they are compared."""


class Interval(Record):
    """A mean over seeds and its bootstrap interval."""

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
    """Numbers of every arm (first axis) and seed (second), and one set of bootstrap draws for all of them."""

    def __init__(self, reports: Sequence[Report], focus: str) -> None:
        self.reports, self.focus = reports, focus
        self.arms = [a.name for a in reports[0].arms]
        self.finetunes = sorted({d.task for d in reports[0].downstream})
        self.rows = np.random.default_rng(0).integers(len(reports), size=(DRAWS, len(reports)))

    def of(self, value: Callable[[Report, int], float]) -> Doubles:
        return np.array([[value(r, i) for r in self.reports] for i in range(len(self.arms))])

    def interval(self, values: Doubles, confidence: float = CONFIDENCE) -> Interval:
        """values [seeds]"""
        lo, hi = np.quantile(values[self.rows].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(mean=float(values.mean()), lo=float(lo), hi=float(hi))


def _kept(finetune: str, task: str) -> Callable[[Report, int], float]:
    def value(report: Report, arm: int) -> float:
        return next(k.after.mean for k in report.arms[arm].kept if (k.downstream, k.task) == (finetune, task))

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
                    downstream=finetune, a=table.arms[i], b=table.arms[0], num_seeds=len(gap), kl=table.interval(kl[i] - kl[0]),
                    kept=table.interval(gap), corrected=table.interval(gap, corrected),
                )
            )  # fmt: skip
    return tuple(found)


def _equal_kl(table: _Table, arms: Sequence[ArmOverSeeds]) -> tuple[AtEqualKl, ...]:
    """Every family of at least two weights against the first such family, where their mean curves overlap in KL.

    A curve is linear between the mean points (KL, kept reward) of its arms; each bootstrap draw of seeds draws both anew.
    """
    families: dict[str, list[int]] = {}
    for i, arm in enumerate(arms):
        families.setdefault(arm.family, []).append(i)
    curves = {f: rows for f, rows in families.items() if len(rows) >= 2}
    if len(curves) < 2:
        return ()
    kl = table.of(_kl)
    first, *rest = curves
    rows = np.concatenate([np.arange(kl.shape[1])[None], table.rows[:2000]])  # the first is the sample itself
    kl_draws = kl[:, rows].mean(axis=2)
    comparisons = (len(curves) - 1) * NUM_KLS * len(table.finetunes)
    confidence = 1 - (1 - CONFIDENCE) / max(1, comparisons)
    found = []
    for finetune in table.finetunes:
        kept_draws = table.of(_kept(finetune, table.focus))[:, rows].mean(axis=2)
        for other in rest:
            spans = [(kl[curves[f]].mean(axis=1).min(), kl[curves[f]].mean(axis=1).max()) for f in (first, other)]
            low, high = max(s[0] for s in spans), min(s[1] for s in spans)
            if low >= high:
                continue
            for at in np.linspace(low, high, NUM_KLS + 2)[1:-1]:
                gaps = _at(kl_draws, kept_draws, curves[other], at) - _at(kl_draws, kept_draws, curves[first], at)

                def interval(level: float, gaps: Doubles = gaps) -> Interval:
                    lo, hi = np.quantile(gaps[1:], [(1 - level) / 2, (1 + level) / 2])
                    return Interval(mean=float(gaps[0]), lo=float(lo), hi=float(hi))

                found.append(
                    AtEqualKl(
                        downstream=finetune, a=other, b=first, kl=float(at), kept=interval(CONFIDENCE), corrected=interval(confidence)
                    )
                )  # fmt: skip
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
        f"{len(table.reports)} seeds; reward on {table.focus} prompts; 95 % intervals by bootstrap over seeds, arms paired by seed."
    )
    return tuple(words)
