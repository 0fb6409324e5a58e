"""Student's t, and a difference that stands between its limits."""

from __future__ import annotations

from scipy.special import stdtrit

from frpo.records import Maybe, Record

CONFIDENCE = 0.95


def t_of(freedom: int, confidence: float) -> float:
    """Standard errors on each side of an interval of Student's t."""
    return float(stdtrit(freedom, (1 + confidence) / 2))


def format_interval(mean: float, lo: float | None, hi: float | None, number: str) -> str:
    """Example: "+0.14 [+0.08, +0.20]" by "+.2f"; the mean alone where there are no limits."""
    if lo is None or hi is None:
        return format(mean, number)
    return f"{mean:{number}} [{lo:{number}}, {hi:{number}}]"


class Difference(Record):
    """Between two policies, paired by prompt."""

    mean: float
    se: Maybe
    """None from fewer than two prompts, and where both were not measured on the same ones."""
    num_prompts: int
    """That both were measured on."""
    confidence: float = CONFIDENCE
    """Of its interval."""

    @property
    def half(self) -> float | None:
        """Of its interval: Student's t over prompts."""
        return None if self.se is None else t_of(self.num_prompts - 1, self.confidence) * self.se

    def __format__(self, number: str) -> str:
        """Example: f"{difference:+.2f}" is "+0.14 [+0.08, +0.20]", and "+0.14" where there is no interval."""
        if self.half is None:
            return format_interval(self.mean, None, None, number)
        return format_interval(self.mean, self.mean - self.half, self.mean + self.half, number)
