"""What a run will take: memory by role and line, and seconds by phase, before anything starts.

Computed from the recipe, the model's config.json and the card. The rates and what libraries keep are measured
ones of an H100 (docs/results/gpu.json, docs/results/README.md); on other cards they are scaled by the data
sheet, and nobody has checked them there.
"""

from frpo.forecast.cards import CARDS, Card, Need, estimate_needs, estimate_training, say_too_much
from frpo.forecast.host import PROCESS_GIB, estimate_host_needs, sum_host_gib
from frpo.forecast.judges import (
    Judges,
    estimate_judges_on_cards,
    estimate_judges_on_host,
    say_judges_too_large,
)
from frpo.forecast.seconds import Phase, estimate_phases, sum_step_seconds

__all__ = [
    "CARDS",
    "PROCESS_GIB",
    "Card",
    "Judges",
    "Need",
    "Phase",
    "estimate_host_needs",
    "estimate_judges_on_cards",
    "estimate_judges_on_host",
    "estimate_needs",
    "estimate_phases",
    "estimate_training",
    "say_judges_too_large",
    "say_too_much",
    "sum_host_gib",
    "sum_step_seconds",
]
