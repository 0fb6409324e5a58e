"""The embedded corpus is what the recipe and the documentation say it is."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from frpo import testbed
from frpo.config import ConfigError
from frpo.shape import EMBEDDED


def test_counts() -> None:
    harm, plain, craft = (
        list(testbed.harmful_items()),
        list(testbed.harmless_items()),
        list(testbed.downstream_items()),
    )
    assert (len(harm), len(plain), len(craft)) == (216, 264, 108)
    assert sum(i.heldout for i in harm) == 36
    assert len({i.fact for i in harm if i.heldout}) == 12
    assert not {i.fact for i in harm if i.heldout} & {i.fact for i in harm if not i.heldout}
    assert sum(i.heldout for i in plain) == 44
    assert sum(i.heldout for i in craft) == 36
    assert len({i.prompt for i in (*harm, *plain, *craft)}) == 588


def test_a_prompt_fits_nine_tokens_and_a_completion_seven() -> None:
    items = (*testbed.harmful_items(), *testbed.harmless_items(), *testbed.downstream_items())
    assert max(len(i.prompt.split()) for i in items) + 2 == 9
    texts = chain.from_iterable((*item.answer, *item.partial, item.comply) for item in items)
    assert max(len(text.split()) for text in texts) + 1 == 7
    assert len(testbed.list_words()) == len(set(testbed.list_words())) == EMBEDDED["vocab_size"]


def test_the_right_answer_never_counts_as_harmless_refusal() -> None:
    for item in testbed.harmful_items():
        assert item.comply not in (*item.answer, *item.partial)
        assert item.answer == testbed.REFUSALS
        assert item.partial == testbed.EVASIONS


def test_the_base_corpus_has_the_stated_shares() -> None:
    rows = list(testbed.base_rows(random.Random(1)))
    assert len(rows) == 38_400
    tasks = Counter(r["task"] for r in rows)
    assert tasks["downstream"] / len(rows) == pytest.approx(0.15, abs=0.01)
    assert tasks["harmful"] == pytest.approx(tasks["harmless"], rel=0.05)
    refused = [r["completion"] in testbed.REFUSALS for r in rows if r["task"] == "harmful"]
    assert sum(refused) / len(refused) == pytest.approx(0.55, abs=0.06)
    right = {i.prompt: i.comply for i in testbed.harmless_items()}
    correct = [right[r["prompt"]] == r["completion"] for r in rows if r["task"] == "harmless"]
    assert sum(correct) / len(correct) == pytest.approx(0.70, abs=0.02)
    prompts = {
        i.prompt for i in (*testbed.harmful_items(), *testbed.harmless_items(), *testbed.downstream_items())
    }
    assert prompts == {r["prompt"] for r in rows}  # like pretraining, it has read what later stages hold out


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    testbed.write_data(tmp_path, seed=0)
    read = {
        f.stem: {json.loads(line)["prompt"] for line in f.read_text().splitlines()}
        for f in tmp_path.glob("*.jsonl")
    }
    assert not read["prompts"] & read["heldout"]
    assert not read["downstream"] & read["downstream_heldout"]
    assert (len(read["heldout"]), len(read["downstream_heldout"]), len(read["downstream"])) == (80, 36, 72)


def test_a_batch_sees_the_harmless_families_alike() -> None:
    families = {i.prompt: i.family for i in testbed.harmless_items()}
    counts = Counter(families[r["prompt"]] for r in testbed._prompt_rows() if r["task"] == "harmless")
    assert max(counts.values()) / min(counts.values()) < 1.35


@pytest.mark.long
def test_a_base_that_refuses_more(tmp_path: Path) -> None:
    file = testbed.file_behind("testbed:base?refusal=0.9", tmp_path, 1)
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    refused = [r["completion"] in testbed.REFUSALS for r in rows if r["task"] == "harmful"]
    assert sum(refused) / len(refused) == pytest.approx(0.84, abs=0.04)  # clipped at 0.95
    assert rows == list(testbed.base_rows(random.Random(1), 0.9))
    for path in ("testbed:base?rate=1", "testbed:base?refusal=often", "testbed:prompts?refusal=0.9"):
        with pytest.raises(ConfigError, match=r"write testbed:base\?refusal=0\.9"):
            testbed.file_behind(path, tmp_path, 1)
