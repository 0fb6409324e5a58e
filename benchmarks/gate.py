"""Does a gated reverse penalty keep more? The questions of docs/results/plans/testbed_gate.md, by its rules.

    frpo sweep recipes/studies/testbed_gate.yaml --seeds 12 --run-dir runs/testbed_gate
    python benchmarks/gate.py runs/testbed_gate --out docs/results

Keeps what each finished seed measured in testbed_gate/, and writes testbed_gate.json: every arm over all
seeds kept, and two families of arms compared at equal KL, seed by seed. A family are the arms of one name
before "-beta".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from study_parts.arguments import ask_for_seeds
from study_parts.contrasts import Contrast, Row, Side, compare, level_of
from study_parts.seeds import Seed, metrics_of, stack
from study_parts.testbed import FOCUS, HARMLESS, list_metrics

from frpo.records import to_json
from frpo.report.drawing import PAPER, add_legend, colour_of, save_png
from frpo.report.intervals import interval_of

KLS = (0.34, 0.38, 0.42, 0.46, 0.50)
"""Nats per completion."""
PRIMARY = "kept after crafts-harsh"
MOST_LOST = 0.02
"""Harmless reward that a verdict lets a family lose."""
FAMILIES = ("grpo", "frpo", "grpo-gate", "frpo-gate")
RIVALS = ("frpo0.2", "frpo0.2-gate", "frpo-k3-gate", "frpo-token", "grpo-sam", "grpo-ema", "grpo-more")
GATES = ("frpo-gate0.25", "frpo-gate0.75", "frpo-gate-harmless0.25", "frpo-gate-harmless1")
QUESTIONS = {
    "1: gated FRPO keeps more": (("frpo-gate", "grpo"), ("frpo-gate", "frpo")),
    "2: gated GRPO keeps more than GRPO": (("grpo-gate", "grpo"),),
    "2: gated FRPO against gated GRPO": (("frpo-gate", "grpo-gate"),),
    "4: rivals against GRPO": tuple((family, "grpo") for family in RIVALS),
    "5: other gates against GRPO": tuple((family, "grpo") for family in GATES),
}
"""Pairs of families; each question is corrected for its own comparisons. The arms of 4 and 5 are a sweep of
their own (recipes/studies/testbed_gate_rivals.yaml), on the same seeds; of its fine-tunes the harsh one alone
is made, which takes half an hour for two seeds."""


def answer(seeds: Sequence[Seed], question: str) -> Iterator[Row]:
    """By every metric, each corrected for the pairs and KLs of the question that enough seeds reach."""
    for metric in metrics_of(seeds):
        pairs = [Contrast(metric, Side(a, metric), Side(b, metric)) for a, b in QUESTIONS[question]]
        yield from compare(seeds, question, pairs, KLS)


def judge(rows: Sequence[Row]) -> bool | None:
    """Whether every KL that is reached shows more kept, at harmless reward that is not lower by more than
    MOST_LOST; None where none is reached."""
    kept = [row for row in rows if row.metric == PRIMARY and row.corrected_lo is not None]
    harmless = [row for row in rows if row.metric == HARMLESS and row.lo is not None]
    if not kept:
        return None
    more = all(row.corrected_lo is not None and row.corrected_lo > 0 for row in kept)
    return more and all(row.lo is not None and row.lo > -MOST_LOST for row in harmless)


def describe_arms(seeds: Sequence[Seed]) -> Iterator[dict[str, Any]]:
    for arm in dict.fromkeys(itertools.chain.from_iterable(seed.arms for seed in seeds)):
        having = [seed for seed in seeds if arm in seed.arms]
        row: dict[str, Any] = {"arm": arm, "seeds": len(having)}
        for metric in having[0].arms[arm]:
            row[metric] = interval_of(stack(having, [arm], metric)[0]).model_dump()
        yield row


def save_picture(seeds: Sequence[Seed], file: Path) -> None:
    """Kept reward over KL, a family a line, a fine-tune a panel: the mean of the seeds that reach a KL, where
    at least LEAST_SEEDS do, and its 95 % interval."""
    metrics = [metric for metric in metrics_of(seeds) if metric.startswith("kept after ")]
    families = [family for family in FAMILIES if any(seed.family(family) for seed in seeds)]
    at = np.linspace(KLS[0] - 0.06, KLS[-1], 23)
    with plt.rc_context(PAPER):
        figure, grid = plt.subplots(1, len(metrics), figsize=(3.4 * len(metrics), 3.3), sharey=True)
        for axes, metric in zip(grid, metrics, strict=True):
            for i, family in enumerate(families):
                having = [seed for seed in seeds if seed.family(family)]
                spans = [level_of(having, Side(family, metric), kl) for kl in at]
                kls = [kl for kl, span in zip(at, spans, strict=True) if span]
                found = [span for span in spans if span]
                axes.plot(kls, [span.mean for span in found], color=colour_of(i), label=family)
                lows = [span.mean if span.lo is None else span.lo for span in found]
                highs = [span.mean if span.hi is None else span.hi for span in found]
                axes.fill_between(kls, lows, highs, color=colour_of(i), alpha=0.13, linewidth=0)
            axes.set(title=metric, xlabel="KL to the reference, nats")
        grid[0].set_ylabel(f"reward, {FOCUS} prompts")
        figure.tight_layout()
        add_legend(grid[0])
        save_png(figure, file)


def main() -> None:
    seeds, out = ask_for_seeds(__doc__, "testbed_gate", list_metrics)
    rows = {question: list(answer(seeds, question)) for question in QUESTIONS}
    result = {
        "study": "testbed_gate",
        "seeds": [seed.seed for seed in seeds],
        "verdicts": {question: judge(of) for question, of in rows.items() if "keeps more" in question},
        "comparisons": [asdict(row) for row in itertools.chain.from_iterable(rows.values())],
        "levels": list(describe_arms(seeds)),
    }
    (out / "testbed_gate.json").write_text(to_json(result) + "\n")
    save_picture(seeds, out / "testbed_gate.png")


if __name__ == "__main__":
    main()
