"""What each advantage estimator of a recipe is: the value that computes it, and its words in a report.

mypy fails where a kind is left out of either function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from frpo.config import EstimatorConfig, FrpoEstimator, GrpoEstimator, RlooEstimator

if TYPE_CHECKING:
    from frpo.objective import Estimator


def make_estimator(section: EstimatorConfig, lam: float | None) -> Estimator:
    """lam: temperature of this batch, reward units; None for an estimator without one."""
    from frpo.objective import Frpo, Grpo, Rloo  # imports torch, which a report does without

    match section:
        case FrpoEstimator():
            assert lam is not None
            return Frpo(lam, section.jackknife, section.scale)
        case GrpoEstimator():
            return Grpo(section.normalize_std)
        case RlooEstimator():
            return Rloo()
        case _:
            assert_never(section)


def describe_estimator(section: EstimatorConfig) -> str:
    """Its name and the settings that set it apart: arms of equal words are one family of a report."""
    match section:
        case FrpoEstimator():
            return _describe_frpo(section)
        case GrpoEstimator():
            return "GRPO with std" if section.normalize_std else "GRPO without std"
        case RlooEstimator():
            return "RLOO"
        case _:
            assert_never(section)


def _describe_frpo(section: FrpoEstimator) -> str:
    words = [f"FRPO λ {section.lam}" if section.rho is None else f"FRPO ρ {section.rho}"]
    if not section.jackknife:
        words.append("no jackknife")
    if section.scale != "code":
        words.append(f"scale {section.scale}")
    return ", ".join(words)
