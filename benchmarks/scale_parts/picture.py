"""A picture of how engines and learners are used, by staleness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SERIES = {
    "engine_use_any": "engines, any place taken",
    "engine_use_places": "engines, places taken",
    "learner_use": "learners",
}
TITLES = {
    "equal": "An update takes as long as drawing with its tail",
    "matched": "An update takes as long as full engines",
}


def draw_use(use: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    from frpo.report.drawing import PAPER

    with plt.rc_context(PAPER):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
        for axis, (part, title) in zip(axes, TITLES.items(), strict=True):
            _draw_part(axis, use[part], title)
        axes[0].set_ylabel("share of the time")
        axes[0].legend(loc="lower right")
        figure.tight_layout()
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _draw_part(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Weights in flight; hollow: drained. Seconds of a step above."""
    flying = [row for row in rows if row["in_flight"]]
    drained = [row for row in rows if not row["in_flight"]]
    places = [str(row["staleness_allowed"]) for row in flying]
    for number, (name, label) in enumerate(SERIES.items()):
        colour = f"C{number}"
        axis.plot(places, [row[name] for row in flying], "o-", color=colour, label=label)
        at = [str(row["staleness_allowed"]) for row in drained]
        axis.plot(at, [row[name] for row in drained], "o", color=colour, markerfacecolor="white")
    for place, row in zip(places, flying, strict=True):
        axis.text(place, 1.03, f"{row['step_s']:.0f} s", ha="center", va="bottom")
    axis.set_ylim(0, 1.12)
    axis.set_title(title)
    axis.set_xlabel("rollout.staleness (hollow: in_flight: false)")
