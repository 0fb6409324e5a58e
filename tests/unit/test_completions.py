"""The text of a completion that rewards see, from what vLLM gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from frpo.actors._sampler import Sampler
from frpo.types import Prompt, Ticket


class Words:
    """A tokenizer of whole words."""

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join("###" if i == 3 else f"w{i}" for i in row) for row in ids]


def output(tokens: list[int], text: str, stop: str | None = None) -> Any:
    """As vLLM's CompletionOutput."""
    rows = [{t: SimpleNamespace(logprob=-1.0)} for t in tokens]
    one = SimpleNamespace(token_ids=tokens, text=text, stop_reason=stop, finish_reason="stop", logprobs=rows)
    one.weight_versions = [SimpleNamespace(version="3", start=0, end=len(tokens))]
    return one


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (output([1, 2], ""), "w1 w2"),  # vLLM writes no text where it need not look for a stop string
        (
            output([1, 2], " w1 w2"),
            "w1 w2",
        ),  # ended by the end of sequence: the same text with stop strings as without
        (output([1, 3], " w1 ", "###"), "w1 "),
        (output([3], " ", "###"), ""),  # at once
        (output([5], " w", "5"), "w"),  # in the middle of a token
        (output([3], "", " ###"), ""),  # the tokenizer drops the blank that the stop string begins with
    ],
)
def test_a_stop_string_is_never_in_the_text(out: Any, text: str) -> None:
    outputs, texts = [out], [text]
    prompt = Prompt("p", "p", np.array([1], np.int32), "t", {})
    sampler: Any = SimpleNamespace(tokenizer=Words())
    sampler.finished = {"7": SimpleNamespace(outputs=outputs)}
    group = Sampler.group_of(sampler, "7", Ticket(0, prompt, 0))
    assert sampler.finished == {}
    assert [c.text for c in group.completions] == texts
    assert [c.token_ids.tolist() for c in group.completions] == [o.token_ids for o in outputs]
