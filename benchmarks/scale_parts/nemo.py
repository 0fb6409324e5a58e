"""What a step of ours would give on 16 H100 at the work that NeMo-RL publishes (1,562 tokens/s a GPU on
policy, 2,161 one step off policy, Llama-3.1-8B in full): simulated, from phases that were measured on one
H100 at 7.6B."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from .engines import Speed
from .simulation import Lengths, Scenario, Simulation

GPUS = 16
MEAN, LIMIT = 1060, 4096
"""Tokens of a sequence; all of them count as drawn. The limit and the spread are assumed."""
PROMPTS, K = 64, 32
GENERATION, UPDATE, SCORING = 15_900, 7_900, 20_500
"""Tokens/s: an engine at 256 sequences, LoRA updates of one GPU, log-probs of one GPU."""
TURN_S = 3.5
"""Putting a role off a card that is shared, or back onto it."""
COLUMNS = (
    "tokens_per_s_per_gpu", "step_s", "generate_s", "score_s", "update_s", "publish_s", "engine_use_any",
    "engine_use_places", "engine_use_tokens", "learner_use", "staleness", "tail_s", "longest",
)  # fmt: skip


def make_scenario(engines: int, sigma: float = 0.6) -> Scenario:
    """The learners' cards score the reference, with their adapters switched off."""
    return Scenario(
        engines,
        GPUS - engines,
        PROMPTS,
        K,
        Lengths(MEAN, sigma, LIMIT),
        update_token_s=1 / UPDATE,
        speed=Speed().at_rate(GENERATION),
        reference_token_s=1 / SCORING,
        warm_up=6,
        measured=12,
    )


def share_cards(scenario: Scenario) -> Scenario:
    return replace(scenario, engines=GPUS, learners=GPUS, shares_cards=True, turn_s=TURN_S)


def play_row(scenario: Scenario, **words: Any) -> dict[str, Any]:
    figures = Simulation(scenario).play()
    split = {"engines": scenario.engines, "learners": scenario.learners}
    return {**split, **words, **{name: figures[name] for name in COLUMNS}}


def measure_nemo(quick: bool) -> dict[str, Any]:
    splits = (4, 6) if quick else (4, 5, 6, 8)
    parts: dict[str, list[dict[str, Any]]] = {
        "together": [play_row(share_cards(make_scenario(GPUS)), shared=True)]
    }
    for engines in splits:
        parts["together"].append(play_row(make_scenario(engines)))
    for staleness in (1,) if quick else (1, 2, 4):
        parts[f"staleness_{staleness}"] = []
        for engines in splits:
            parts[f"staleness_{staleness}"].append(
                play_row(replace(make_scenario(engines), staleness=staleness))
            )
    if not quick:
        parts["reference_apart"] = move_reference()
        parts["room"] = vary_room()
        parts |= vary_work()
    best = {}
    for name, rows in parts.items():
        best[name] = max(rows, key=lambda row: row["tokens_per_s_per_gpu"])
    per_token_s = 1 / GENERATION + 1 / SCORING + 1 / UPDATE
    return {
        "simulated": True,
        "sequences": {"mean": MEAN, "limit": LIMIT, "sigma": 0.6, "per_step": PROMPTS * K},
        "tokens_per_s": {"engine": GENERATION, "update_per_gpu": UPDATE, "scoring_per_gpu": SCORING},
        "bound": 1 / per_token_s,
        "nemo": {"together": 1562, "one_step_off": 2161},
        "goal": 4000,
        "best": best,
        **parts,
    }


def move_reference() -> list[dict[str, Any]]:
    """To cards of its own."""
    rows = []
    for staleness in (1, 2):
        for engines, references in ((4, 3), (5, 2), (5, 3)):
            split = replace(
                make_scenario(engines), learners=GPUS - engines - references, references=references
            )
            rows.append(
                play_row(
                    replace(split, staleness=staleness), references=references, staleness_allowed=staleness
                )
            )
    return rows


def vary_room() -> list[dict[str, Any]]:
    """Groups of K = 32 hold their room until the longest of 32 is drawn; and weights that go out before
    the scoring that waits for the learners."""
    rows = []
    for engines, room, first in product((4, 5), (2.0, 4.0), (False, True)):
        asked = replace(make_scenario(engines), staleness=2, room=room, publishes_first=first)
        rows.append(play_row(asked, staleness_allowed=2, room=room, publishes_first=first))
    return rows


def vary_work() -> dict[str, list[dict[str, Any]]]:
    """The best splits with completions that are more or less alike, without a reference, and with a batch
    that is larger."""
    rows: dict[str, list[dict[str, Any]]] = {
        "narrow": [],
        "wide": [],
        "no_reference": [],
        "batch_times_4": [],
    }
    for staleness in (1, 2):
        for engines in (5, 6):
            ahead = replace(make_scenario(engines), staleness=staleness)
            words = {"staleness_allowed": staleness}
            for name, sigma in (("narrow", 0.3), ("wide", 1.0)):
                lengths = replace(ahead.lengths, sigma=sigma)
                rows[name].append(play_row(replace(ahead, lengths=lengths), sigma=sigma, **words))
            rows["no_reference"].append(play_row(replace(ahead, reference_token_s=None), **words))
            larger = replace(ahead, prompts=4 * PROMPTS, measured=3)
            rows["batch_times_4"].append(play_row(larger, **words))
    return rows
