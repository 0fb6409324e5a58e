"""How well the loops use engines and learners, by staleness: simulated."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .simulation import Lengths, Scenario, Simulation

K = 8
ORDINARY = Lengths(mean=1500, sigma=0.6, limit=4096)
HEAVY = Lengths(mean=1500, sigma=1.0, limit=16_384)
ROOMS = (1.0, 1.25, 1.5, 2.0, 4.0)
MEANING = {
    "engine_use_any": "share of engine-seconds in which it decoded anything",
    "engine_use_full": "share of engine-seconds in which all places (max_num_seqs) were taken",
    "engine_use_places": "mean share of places that were taken",
    "engine_use_tokens": "tokens drawn, as a share of what full engines would draw",
    "learner_use": "share of seconds in which the learners' cards worked (updates, scoring, sending)",
    "tail_s": "staleness 0: from the first engine that has nothing left to the last group; else: from when a "
    "step has as many groups as it takes until it may leave the older ones that are missing",
    "staleness": "updates, mean over the tokens that were trained on; max_staleness: of the oldest token",
    "matched": "an update takes as long as full engines take to draw a step",
    "equal": "an update takes as long as the engines take at staleness 0, tail and all",
    "batch": "completions of a step as a multiple of all places of all engines",
    "widest": "1,024 engines and 65,536 completions a step, a quarter of all places",
    "room": "completions that an engine has in hand, as a multiple of max_num_seqs; RolloutPool.open gives 2",
}


def make_base(engines: int, batch: float = 1.0, lengths: Lengths = ORDINARY) -> Scenario:
    """As many learners as engines, and updates that take as long as full engines take to draw a step."""
    base = Scenario(engines, engines, 0, K, lengths, 0.0)
    prompts = round(engines * base.speed.slots * batch / K)
    return replace(base, prompts=prompts, update_token_s=1 / base.speed.tokens_per_s)


def play_row(scenario: Scenario, **words: Any) -> dict[str, Any]:
    """A row: `words`, what was asked, and what came of it."""
    asked = {"staleness_allowed": scenario.staleness, "in_flight": scenario.in_flight}
    row = {**words, **asked, **Simulation(scenario).play()}
    print(".", end="", file=sys.stderr, flush=True)
    return row


def play_by_staleness(base: Scenario) -> list[dict[str, Any]]:
    rows = [play_row(base)]
    for staleness in (1, 2, 4):
        for in_flight in (True, False):
            rows.append(play_row(replace(base, staleness=staleness, in_flight=in_flight)))
    return rows


def slow_down(base: Scenario) -> Scenario:
    """With learners that take as long as the engines do at staleness 0."""
    alone = Simulation(replace(base, update_token_s=1e-12)).play()
    tokens = base.prompts * base.k * base.lengths.mean
    return replace(base, update_token_s=alone["generate_s"] * base.learners / tokens)


def vary_room(base: Scenario, staleness: Iterable[int]) -> list[dict[str, Any]]:
    rows = []
    for each in staleness:
        for room in ROOMS:
            rows.append(play_row(replace(base, staleness=each, room=room), room=room))
    return rows


def play_longer(base: Scenario, equal: Scenario) -> list[dict[str, Any]]:
    """Some rows again over more steps, after more: what the first ones left has worn off."""
    rows = []
    for name, scenario in (("equal", equal), ("matched", base)):
        for staleness in (1, 2):
            longer = replace(scenario, staleness=staleness, warm_up=8, measured=10)
            rows.append(play_row(longer, update=name))
    return rows


def measure_use(quick: bool) -> dict[str, Any]:
    engines = 8 if quick else 64
    base = make_base(engines)
    equal = slow_down(base)
    parts = {"equal": play_by_staleness(equal), "matched": play_by_staleness(base)}
    if not quick:
        parts["room"] = vary_room(base, (1, 2, 4))
        parts["room_drained"] = vary_room(replace(base, in_flight=False), (1,))
        parts["settled"] = play_longer(base, equal)
        parts["batch"] = []
        for batch in (0.5, 2.0, 4.0):
            for staleness in (1, 2):
                asked = replace(make_base(16, batch), staleness=staleness)
                parts["batch"].append(play_row(asked, batch=batch, engines=16))
        parts["heavy"] = []
        for staleness in (0, 1, 2, 4):
            parts["heavy"].append(play_row(replace(make_base(engines, lengths=HEAVY), staleness=staleness)))
        parts["by_engines"] = []
        for count in (16, 256):
            for staleness in (1, 2):
                parts["by_engines"].append(
                    play_row(replace(make_base(count), staleness=staleness), engines=count)
                )
        widest = make_base(1024, batch=0.25)
        parts["widest"] = [play_row(replace(widest, staleness=staleness)) for staleness in (0, 1, 2)]
    return {
        "simulated": True,
        "engines": engines,
        "learners": engines,
        "completions_per_step": base.prompts * base.k,
        "meaning": MEANING,
        "update_tokens_per_s_per_gpu": {
            "matched": 1 / base.update_token_s,
            "equal": 1 / equal.update_token_s,
        },
        **parts,
        "goals": check_goals(parts),
    }


def check_goals(parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    goals: dict[str, Any] = {}
    for name in ("equal", "matched"):
        together, ahead = parts[name][0], parts[name][1]
        goals[name] = {
            "engine_use_any_at_staleness_1": ahead["engine_use_any"],
            "engine_use_goal": 0.9,
            "faster_than_synchronous": {},
        }
        for row in parts[name][1:]:
            ratio = together["step_s"] / row["step_s"]
            label = f"{row['staleness_allowed']}, {'in flight' if row['in_flight'] else 'drained'}"
            goals[name]["faster_than_synchronous"][label] = ratio
    goals["equal"]["faster_goal"] = 1.7
    return goals
