"""Rows, their errors, and streams that deal every row once per epoch."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.config import ConfigError, DatasetConfig
from frpo.data_checks import check_rows
from frpo.prompts import Examples, ExampleStream, PromptStream, load_examples, load_prompts
from frpo.sources import read_dataset
from frpo.types import Prompt


class Tokenizer:
    """One token per word: its length."""

    chat_template = "words"
    bos_token_id = 0
    eos_token_id = 99

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [len(w) for w in text.split()]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        words = chain.from_iterable(message["content"].split() for message in messages)
        return [50, *map(len, words), 51]


ROWS = [
    {"prompt": f"word {'x' * (i + 1)}", "completion": "yes sir", "kind": "ab"[i % 2], "n": i}
    for i in range(10)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ".csv" in path.name:
        text = "\n".join([",".join(rows[0]), *(",".join(map(str, r.values())) for r in rows)])
        path.write_text(text)
    else:
        text = "".join(json.dumps(r) + "\n" for r in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.csv", "r.parquet"])
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str) -> None:
    source = DatasetConfig(path=write(tmp_path / name, ROWS), task_column="kind")
    rows = list(read_dataset(source))
    assert [r.text for r in rows] == [r["prompt"] for r in ROWS]
    assert [r.task for r in rows] == list("ababababab")
    assert [str(r.columns["n"]) for r in rows] == [str(i) for i in range(10)]
    assert "prompt" not in rows[0].columns


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    assert [
        r.columns["n"] for r in read_dataset(DatasetConfig(path=str(tmp_path / "set"), task="t"))
    ] == list(range(10))


def test_where_limit_and_nested_columns(tmp_path: Path) -> None:
    rows = [{"q": "a b", "label": str(i % 2), "extra": {"list": [{"text": f"t{i}"}]}} for i in range(6)]
    source = DatasetConfig(
        path=write(tmp_path / "r.jsonl", rows),
        prompt="q",
        task="t",
        where={"label": "1"},
        completion="extra.list.0.text",
        limit=2,
    )
    assert [r.completion for r in read_dataset(source)] == ["t1", "t3"]


def test_the_heldout_split_is_by_prompt_and_complete(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i % 200}"} for i in range(400)]
    path = write(tmp_path / "r.jsonl", rows)
    whole = DatasetConfig(path=path, task="t", heldout_share=0.25)
    parts = {
        part: [row.text for row in read_dataset(whole.model_copy(update={"part": part}))]
        for part in ("train", "heldout")
    }
    assert not set(parts["train"]) & set(parts["heldout"])
    assert sorted(parts["train"] + parts["heldout"]) == sorted(r["prompt"] for r in rows)
    assert 0.15 < len(parts["heldout"]) / 400 < 0.35


def test_fixed_completions_are_chosen_by_the_prompt(tmp_path: Path) -> None:
    source = DatasetConfig(
        path=write(tmp_path / "r.jsonl", ROWS), task="t", completion_texts=("no", "never", "nope")
    )
    first, second = ([r.completion for r in read_dataset(source)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"r.jsonl:2: no column 'prompt'; it has text"),
        ({"prompt": "  "}, r"r.jsonl:2: column 'prompt' is '  '; it must be a non-empty string or a list"),
        (
            {"prompt": [{"role": "user"}]},
            r"r.jsonl:2: column 'prompt': the message \{'role': 'user'\} needs role and content",
        ),
        (
            {"prompt": "x", "completion": ""},
            r"r.jsonl:2: column 'completion' is ''; it must be a non-empty string",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "r.jsonl", [{"prompt": "fine", "completion": "fine"}, row])
    with pytest.raises(ConfigError, match=message):
        check_rows([DatasetConfig(path=path, task="t", completion="completion")])


def test_a_source_without_rows_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", ROWS)
    assert check_rows([DatasetConfig(path=path, task="t")]).rows == 10
    with pytest.raises(ConfigError, match="no row left after where"):
        check_rows([DatasetConfig(path=path, task="t", where={"kind": "c"})])


def test_long_prompts_are_dropped_and_counted_never_cut(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a bb ccc"},
        {"prompt": "a " * 30},
        {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi you"}]},
    ]
    prompts, dropped = load_prompts(
        [DatasetConfig(path=write(tmp_path / "r.jsonl", rows), task="t")], Tokenizer(), 10
    )
    assert dropped == 1
    assert [p.token_ids.tolist() for p in prompts] == [[0, 1, 2, 3], [50, 2, 4, 2, 3, 51]]
    assert [p.text for p in prompts] == ["a bb ccc", "hi you"]


def test_examples_end_with_eos(tmp_path: Path) -> None:
    source = DatasetConfig(path=write(tmp_path / "r.jsonl", ROWS), task="t", completion="completion")
    examples, dropped = load_examples([source], Tokenizer(), 20)
    assert (len(examples), dropped) == (10, 0)
    data = examples.take([3])
    assert data.tokens.tolist() == [0, 4, 4, 3, 3, 99]
    assert data.prompt_lengths.tolist() == [3]


CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and no_system %}{{ "
    "raise_exception('System role not supported') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false "
    "%}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SYSTEM, HI, HELLO = (
    {"role": r, "content": c}
    for r, c in (("system", "Be short."), ("user", "hi [/INST]"), ("assistant", "hello you"))
)


def real_tokenizer(special: str = "<s> $A", **tokens: str | None) -> Any:
    """A tokenizer of bytes with the special tokens of ChatML, and what `special` says it puts around a
    text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate([*names, *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(n, normalized=False) for n in names])
    inner.post_processor = processors.TemplateProcessing(
        single=special, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{"bos_token": "<s>", "eos_token": "<|im_end|>", **tokens},
        chat_template=CHATML,
    )


def loaded(tmp_path: Path, tokenizer: Any, *prompts: Any, **fields: Any) -> list[Prompt]:
    path = write(tmp_path / "r.jsonl", [{"prompt": p} for p in prompts])
    return load_prompts([DatasetConfig(path=path, task="t", **fields)], tokenizer, 200)[0]


def test_a_prompt_begins_once_and_does_not_end(tmp_path: Path) -> None:
    tokenizer = real_tokenizer("<s> $A </s>", eos_token="</s>")
    plain = loaded(tmp_path, tokenizer, "hi you", "<s>hi you", "<s><s>hi you", "hi you</s>")
    assert [tokenizer.decode(p.token_ids) for p in plain] == ["<s>hi you"] * 4
    chat = loaded(tmp_path, tokenizer, "hi", chat=True)
    assert tokenizer.decode(chat[0].token_ids) == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_whole_conversation_comes_with_its_prompt(tmp_path: Path) -> None:
    tokenizer = real_tokenizer()
    plain, chat = (loaded(tmp_path, tokenizer, "hi", **fields)[0] for fields in ({}, {"chat": True}))
    assert (plain.messages, plain.conversational) == ((), False)
    assert (chat.messages, chat.conversational, chat.text) == (
        ({"role": "user", "content": "hi"},),
        False,
        "hi",
    )
    (row,) = loaded(tmp_path, tokenizer, [SYSTEM, HI, HELLO, HI])
    assert (row.messages, row.conversational, row.text) == ((SYSTEM, HI, HELLO, HI), True, "hi [/INST]")


def test_a_system_prompt_goes_before_what_has_none(tmp_path: Path) -> None:
    prompts = loaded(
        tmp_path,
        real_tokenizer(),
        "hi [/INST]",
        [HI],
        [{"role": "system", "content": "mine"}, HI],
        system="Be short.",
    )
    assert [p.messages[0]["content"] for p in prompts] == ["Be short.", "Be short.", "mine"]
    assert [p.conversational for p in prompts] == [False, True, True]
    assert prompts[0].token_ids.tolist() == prompts[1].token_ids.tolist()


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    tokenizer = real_tokenizer()
    (prompt,) = loaded(tmp_path, tokenizer, [HI], chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(prompt.token_ids).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        (
            [SYSTEM, HI],
            {"chat_template_kwargs": {"no_system": True}},
            "refuses messages of system, user (TemplateError: System role not",
        ),
        (
            "hi",
            {"chat": True, "chat_template_kwargs": {"chat_template": "{{ messages[1].content.x }}"}},
            "refuses messages of user (Undefined",
        ),
        (
            "hi",
            {"chat": True, "chat_template_kwargs": {"chat_template": "{% for %}"}},
            "(TemplateSyntaxError: ",
        ),
        (
            "hi",
            {"chat": True, "chat_template_kwargs": {"chat_template": "{{ '' }}"}},
            "no token is left of this prompt ('hi')",
        ),
    ],
)
def test_what_a_template_refuses_is_named_by_row(
    tmp_path: Path, prompt: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, real_tokenizer(), prompt, **fields)
    assert str(raised.value).startswith(f"{tmp_path}/r.jsonl:1: ")
    assert message in str(raised.value)


def test_columns_by_names_that_functions_know_do_not_reach_them(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl",
        [{"prompt": "a", "prompts": "b", "completion_ids": [1], "answer": 2, "task": "x"}],
    )
    (prompt,) = load_prompts([DatasetConfig(path=path, task="t")], real_tokenizer(), 9)[0]
    assert prompt.columns == {"answer": 2, "task": "x"}


def test_a_column_that_a_row_lacks_is_none_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b", "hint": "h"}])
    prompts, _ = load_prompts([DatasetConfig(path=path, task="t")], real_tokenizer(), 20)
    assert [p.columns for p in prompts] == [{"answer": 1, "hint": None}, {"answer": None, "hint": "h"}]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": [SYSTEM, HI, HELLO, HI, HELLO]}, {"prompt": "messages"}),
        ({"prompt": [SYSTEM, HI, HELLO, HI], "completion": [HELLO]}, {"completion": "completion"}),
    ],
)
def test_an_example_is_what_the_template_writes_of_the_conversation(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, Any]
) -> None:
    tokenizer = real_tokenizer()
    source = DatasetConfig(path=write(tmp_path / "r.jsonl", [row]), task="t", **fields)
    examples, _ = load_examples([source], tokenizer, 300)
    ((prompt, completion),) = examples.pairs
    whole = tokenizer.apply_chat_template([SYSTEM, HI, HELLO, HI, HELLO], tokenize=False)
    assert tokenizer.decode([*prompt, *completion]) == whole.removesuffix("\n")
    assert tokenizer.decode(completion) == "hello you<|im_end|>"


def test_answers_end_once_and_a_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"prompt": "a", "c": "yes"}, {"prompt": "a", "c": "yes<|im_end|>"}])
    source = DatasetConfig(path=path, task="t", completion="c")
    tokenizer = real_tokenizer("<s> $A </s>")
    examples, _ = load_examples([source], tokenizer, 300)
    assert [tokenizer.decode(c) for _, c in examples.pairs] == ["yes<|im_end|>"] * 2
    with pytest.raises(ConfigError, match=r"model.path: its tokenizer has no end of sequence"):
        load_examples([source], real_tokenizer(eos_token=None), 300)


def prompts_of(counts: dict[str, int]) -> list[Prompt]:
    prompts: list[Prompt] = []
    for task, count in counts.items():
        prompts += [Prompt(f"{task}:{i}", "", np.zeros(1, np.int32), task, {}) for i in range(count)]
    return prompts


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_prompt_once_per_epoch_and_no_history(count: int, per_step: int, seed: int) -> None:
    prompts = prompts_of({"t": count})
    stream = PromptStream(prompts, {}, seed, per_step)
    steps = -(-3 * count // per_step)
    dealt = [prompt.id for prompt in chain.from_iterable(map(stream.take, range(steps)))]
    for epoch in range(3):
        assert sorted(dealt[epoch * count : (epoch + 1) * count]) == sorted(p.id for p in prompts)
    again = PromptStream(prompts, {}, seed, per_step)
    assert [p.id for p in again.take(steps - 1)] == dealt[(steps - 1) * per_step : steps * per_step]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(0, 3))
def test_a_mix_keeps_its_shares_in_every_batch(per_step: int, seed: int) -> None:
    mix = {"a": 0.5, "b": 0.3, "c": 0.2}
    stream = PromptStream(prompts_of({"a": 7, "b": 11, "c": 3}), mix, seed, per_step)
    total: Counter[str] = Counter()
    for step in range(30):
        batch = Counter(p.task for p in stream.take(step))
        total += batch
        for task, share in mix.items():
            assert abs(batch[task] - share * per_step) < 2
    for task, share in mix.items():
        assert abs(total[task] - share * 30 * per_step) <= 1
    for task, n in (("a", 7), ("b", 11), ("c", 3)):
        seen = [
            prompt.id for prompt in chain.from_iterable(map(stream.take, range(30))) if prompt.task == task
        ]
        assert all(
            sorted(seen[i : i + n]) == sorted(set(seen[i : i + n])) for i in range(0, len(seen) - n + 1, n)
        )


def test_example_stream_in_order_and_shuffled() -> None:
    pairs = tuple((np.array([i], np.int32), np.array([100 + i], np.int32)) for i in range(6))
    examples = Examples(pairs, ("a",) * 4 + ("b",) * 2)
    ordered = ExampleStream(examples, 4, 0, in_order=True)
    assert ordered.take(1).tokens[::2].tolist() == [4, 5, 0, 1]
    shuffled = ExampleStream(examples, 3, 0)
    assert sorted([*shuffled.take(0).tokens[::2], *shuffled.take(1).tokens[::2]]) == list(range(6))


def test_examples_are_mixed_by_share_whatever_their_number() -> None:
    pairs = tuple((np.array([i], np.int32), np.array([100 + i], np.int32)) for i in range(6))
    examples = Examples(pairs, ("a",) * 4 + ("b",) * 2)
    stream = ExampleStream(examples, 20, 0, mix={"a": 0.95, "b": 0.05})
    batches = [stream.take(step).tokens[::2].tolist() for step in range(4)]
    rare = [set(batch) & {4, 5} for batch in batches]
    assert list(map(len, rare)) == [1, 1, 1, 1]
    assert set.union(*rare) == {4, 5}
    assert (
        ExampleStream(examples, 20, 0, mix={"a": 0.95, "b": 0.05}).take(3).tokens[::2].tolist() == batches[3]
    )
    alone = ExampleStream(examples, 8, 0, mix={"a": 1.0})
    assert sorted(alone.take(0).tokens[::2].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_prompt_can_be_a_template_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"Body": "A bag.", "q": {"ask": "How many?"}}])
    (row,) = read_dataset(DatasetConfig(path=path, task="t", prompt="{Body} {q.ask}"))
    assert row.prompt == "A bag. How many?"
    assert set(row.columns) == {"Body", "q"}
    with pytest.raises(ConfigError, match=r"r.jsonl:1: no column 'body'; it has Body, q"):
        list(read_dataset(DatasetConfig(path=path, task="t", prompt="{body}")))


def test_an_empty_last_column_keeps_a_row_on_its_side_of_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"ask": f"Write poem {i}.", "input": ""} for i in range(40)])
    split = {"path": path, "task": "t", "heldout_share": 0.5, "part": "heldout"}
    plain, filled = (
        [r.text for r in read_dataset(DatasetConfig(**split, prompt=p))] for p in ("ask", "{ask}\n\n{input}")
    )
    assert 10 < len(plain) < 30
    assert plain == filled


def test_a_template_that_ends_with_words_keeps_its_blanks(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"ask": "How many?"}])
    (row,) = read_dataset(DatasetConfig(path=path, task="t", prompt=" Q: {ask}\nA: "))
    assert row.prompt == " Q: How many?\nA: "
