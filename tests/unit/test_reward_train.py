"""What a reward model is trained on, and how its accuracy is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frpo.config import ConfigError
from frpo.reward_train import RewardTraining, accuracy_of, last_turn, read_pairs, train_reward_model


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


def test_pairs_in_another_form_are_refused_with_the_one_that_is_read(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"chosen": "a good answer", "rejected": "a bad one"}) + "\n")
    with pytest.raises(ConfigError) as refused:
        train_reward_model(tmp_path / "none", file, tmp_path / "out", RewardTraining())
    assert str(refused.value) == (
        f"reward-train --pairs: {file} has 0 training and 0 held-out pairs; give more (at least 16 and 1), "
        r"each answer with its dialogue in hh-rlhf's form: \n\nHuman: ...\n\nAssistant: ..."
    )
