"""What a reward model is trained on, and how its accuracy is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frpo.reward_train import accuracy_of, last_turn, read_pairs


def test_the_interval_is_wilsons() -> None:
    """8 of 10 at 95 %: the textbook's [0.490, 0.943]."""
    accuracy = accuracy_of(8, 10)
    assert (accuracy.mean, accuracy.num_pairs) == (0.8, 10)
    assert (accuracy.lo, accuracy.hi) == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_the_last_turns_of_a_dialogue_are_its_pair(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant:  d"
    assert last_turn(dialogue) == ("c", "d")
    assert last_turn("\n\nHuman: a") == ("a", "")
    rows = [
        {"chosen": dialogue, "rejected": dialogue.replace("d", "e")},
        {"chosen": dialogue, "rejected": dialogue},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, heldout = read_pairs(file)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in (*train, *heldout)] == [("c", "d", "e")]
