"""What a run will take: memory by role and line, and seconds by phase, before anything starts.

Computed from the recipe, the model's config.json and the card. The rates and what libraries keep are measured
ones of an H100 (docs/results/gpu.json, docs/results/README.md); on other cards they are scaled by the data
sheet, and nobody has checked them there.
"""

from frpo.forecast.cards import CARDS, Card, Need, needs, too_much, training
from frpo.forecast.host import PROCESS_GIB, host_gib, host_needs
from frpo.forecast.seconds import Phase, step_phases, step_seconds

__all__ = [
    "CARDS",
    "PROCESS_GIB",
    "Card",
    "Need",
    "Phase",
    "host_gib",
    "host_needs",
    "needs",
    "step_phases",
    "step_seconds",
    "too_much",
    "training",
]
