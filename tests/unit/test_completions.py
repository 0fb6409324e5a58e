"""The text of a completion that rewards see, from what vLLM gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors._sampler import Sampler
from frpo.types import Prompt, Sampling


class Words:
    """A tokenizer of whole words."""

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join("###" if i == 3 else f"w{i}" for i in row) for row in ids]


def output(tokens: list[int], text: str) -> Any:
    """As vLLM's CompletionOutput."""
    return SimpleNamespace(token_ids=tokens, text=text, finish_reason="stop", logprobs=[{t: SimpleNamespace(logprob=-1.0)} for t in tokens])


@pytest.mark.parametrize(
    ("stop", "outputs", "texts"),
    [
        ((), [output([1, 2], "")], ["w1 w2"]),  # vLLM writes no text where it need not look for a stop string
        (("###",), [output([1, 3], "w1 "), output([3], ""), output([5], "w")], ["w1 ", "", "w"]),
    ],
)
def test_a_stop_string_is_never_in_the_text(stop: tuple[str, ...], outputs: list[Any], texts: list[str]) -> None:
    prompt = Prompt("p", "p", np.array([1], np.int32), "t", {})
    group = Sampler._group(SimpleNamespace(tokenizer=Words()), 0, prompt, outputs, Sampling(len(outputs), 5, stop=stop), 0)  # type: ignore[arg-type]
    assert [c.text for c in group.completions] == texts
    assert [c.token_ids.tolist() for c in group.completions] == [o.token_ids for o in outputs]
