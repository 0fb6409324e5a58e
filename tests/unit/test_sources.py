"""Checked rows: conversations, completions, templates, labels, the held-out split, and what training shares
with it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from frpo.config import ConfigError, DatasetConfig
from frpo.config.data import split_template
from frpo.data_checks import MAX_OVERLAP, check_rows, identity_of, measure_overlap
from frpo.sources import Row, normalize_text, read_dataset

SYSTEM = {"role": "system", "content": "Be short."}
HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path: str, **fields: Any) -> DatasetConfig:
    return DatasetConfig.model_validate({"path": path, "task": "t", **fields})


def refusal(path: Path, row: dict[str, Any], examples: bool = False, **fields: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        list(read_dataset(source(write(path, row), **fields), examples))
    message = str(raised.value)
    assert message.startswith(f"{path}:1: ")
    return message.removeprefix(f"{path}:1: ")


# ---- conversations


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [HI, HELLO],
            "column 'prompt': the conversation ends with a message of assistant, and the model is asked for "
            "the next one",
        ),
        ([HI, SYSTEM], "column 'prompt': the conversation ends with a message of system"),
        (
            [SYSTEM, {"role": "user", "content": " \n"}],
            "column 'prompt': the last message, which the model answers, is empty",
        ),
        (
            [{"role": "human", "content": "hi"}],
            "column 'prompt': unknown role 'human'; use one of system, developer, user, assistant",
        ),
        ([{"role": "User", "content": "hi"}], "column 'prompt': unknown role 'User'"),
        (
            [{"from": "human", "value": "hi"}],
            "column 'prompt': the message {'from': 'human', 'value': 'hi'} needs role and content",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "needs role and content, both strings",
        ),
        (["hi"], "column 'prompt': the message 'hi' needs role and content"),
        (
            [HI, {**HELLO, "tool_calls": [{"id": 1}]}, HI],
            "column 'prompt': a message calls tools, which would be lost",
        ),
        ([], "column 'prompt' is []; it must be a non-empty string or a list of chat messages"),
        ({"role": "user", "content": "hi"}, "column 'prompt' is {'role'"),
    ],
)
def test_a_conversation_that_cannot_be_gone_on_with_is_refused(
    tmp_path: Path, messages: Any, message: str
) -> None:
    assert message in refusal(tmp_path / "r.jsonl", {"prompt": messages})


def test_messages_keep_what_templates_read_and_lose_the_rest(tmp_path: Path) -> None:
    messages = [
        HI,
        {**HELLO, "reasoning_content": "greet", "tool_calls": None},
        {"role": "tool", "content": "4", "tool_call_id": "a", "n": 3},
    ]
    (row,) = read_dataset(source(write(tmp_path / "r.jsonl", {"prompt": messages})))
    assert row.prompt == (
        HI,
        {**HELLO, "reasoning_content": "greet"},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
    )
    assert row.text == "hi"


def test_a_long_value_is_shown_short(tmp_path: Path) -> None:
    assert len(refusal(tmp_path / "r.jsonl", {"prompt": {"a": "x" * 9000}})) < 300


# ---- examples


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": [SYSTEM, HI, HELLO]}, {"prompt": "messages"}),
        ({"prompt": [SYSTEM, HI], "completion": [HELLO]}, {"completion": "completion"}),
        ({"prompt": [SYSTEM, HI], "completion": "hello"}, {"completion": "completion"}),
        ({"prompt": [SYSTEM, HI]}, {"completion_texts": ["hello"]}),
    ],
)
def test_examples_in_the_forms_of_the_hub(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, Any]
) -> None:
    (example,) = read_dataset(source(write(tmp_path / "r.jsonl", row), **fields), examples=True)
    assert (example.prompt, example.completion) == ((SYSTEM, HI), "hello")
    assert check_rows([], examples=[source(write(tmp_path / "r.jsonl", row), **fields)]).rows == 1


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"prompt": "a"},
            {},
            "column 'prompt' is a string, and fine-tuning needs its completion; give completion (a column)",
        ),
        (
            {"prompt": [HI]},
            {},
            "the conversation must end with an answer of the assistant, which is what fine-tuning learns; it "
            "has 1 mess",
        ),
        ({"prompt": [HELLO]}, {}, "it has 1 messages, the last by assistant"),
        (
            {"prompt": [HI, {"role": "assistant", "content": " "}]},
            {},
            "must end with an answer of the assistant",
        ),
        ({"prompt": [HI, HELLO, HELLO]}, {}, "the conversation ends with a message of assistant"),
        (
            {"prompt": [HI, HELLO], "c": "x"},
            {"completion": "c"},
            "the conversation ends with a message of assistant",
        ),
        (
            {"prompt": [HI], "c": [HI]},
            {"completion": "c"},
            "column 'c' has messages of user; a completion is one message of the assistant",
        ),
        (
            {"prompt": [HI], "c": [HELLO, HELLO]},
            {"completion": "c"},
            "column 'c' has messages of assistant, assistant",
        ),
        (
            {"prompt": [HI], "c": []},
            {"completion": "c"},
            "column 'c' is []; it must be a non-empty string, or one assistant message",
        ),
        (
            {"prompt": [HI], "c": None},
            {"completion": "c"},
            "column 'c' is None; it must be a non-empty string",
        ),
    ],
)
def test_an_example_without_its_answer_is_refused(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    assert message in refusal(tmp_path / "r.jsonl", row, examples=True, **fields)


# ---- templates, labels, columns


def test_doubled_braces_are_braces(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"q": "hi {you}", "n": 3, "none": None})
    for template, text in {
        'Say {{"a": 1}}: {q}': 'Say {"a": 1}: hi {you}',
        "{{{n}}}": "{3}",
        "{{}}": "{}",
        "{n}{none}": "3",
        "no column }} here": "no column } here",
    }.items():
        (row,) = read_dataset(source(path, prompt=template))
        assert row.prompt == text


@pytest.mark.parametrize("template", ['Say {"a": 1}: {q', "{q}}", "{}", "a { b", "{q{r}}", "}{"])
def test_a_brace_without_partner_is_refused_by_field(template: str) -> None:
    with pytest.raises(
        ValidationError,
        match=r"prompt\n.*at character \d+ has no partner; write (\{\{|\}\}) for a brace of the text",
    ):
        source("r.jsonl", prompt=template)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_with_its_braces_doubled_is_a_template_of_itself(text: str) -> None:
    doubled = text.replace("{", "{{").replace("}", "}}")
    assert "".join(piece for piece, column in split_template(doubled) if not column) == text
    assert split_template(doubled + "{q}")[-1] == ("", "q")


def test_a_template_takes_strings_and_numbers(tmp_path: Path) -> None:
    assert "column 'q' is ['a']; a template takes strings and numbers" in refusal(
        tmp_path / "r.jsonl", {"q": ["a"]}, prompt="{q}?"
    )


@pytest.mark.parametrize("label", [None, "", "  ", ["a"], {"a": 1}])
def test_a_label_is_needed_in_every_row(tmp_path: Path, label: Any) -> None:
    row = {"prompt": "a", "kind": label}
    assert "task_column needs a label in every row" in refusal(
        tmp_path / "r.jsonl", row, task=None, task_column="kind"
    )


def test_invisible_names_are_shown(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "r.jsonl", {"\u200bprompt": "a", "b": 1})
        == "no column 'prompt'; it has '\\u200bprompt', b"
    )


def test_columns_that_functions_know_for_something_else_are_noted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "prompts": "x", "completions": "y", "answer": 1},
        {"prompt": "c", "prompts": "x"},
    ]
    path = write(tmp_path / "r.jsonl", *rows)
    checked = check_rows([source(path)])
    assert checked.notes == (
        f"{path}:2: reward functions do not get the column completions, prompts, but what frpo calls so; "
        "rename it",
    )
    assert check_rows([], examples=[source(path, completion_texts=("no",))]).notes == ()


def test_template_arguments_where_no_template_is_applied_are_refused(tmp_path: Path) -> None:
    asked = {"chat_template_kwargs": {"enable_thinking": False}}
    assert "chat_template_kwargs do nothing; set chat: true" in refusal(
        tmp_path / "r.jsonl", {"prompt": "a"}, **asked
    )
    path = write(tmp_path / "r.jsonl", {"prompt": "a"})
    for fields in ({"chat": True}, {"system": "Be kind."}):
        assert len(list(read_dataset(source(path, **asked, **fields)))) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize is no argument of the template"),
        (
            {"chat_template_kwargs": {"truncation": True, "max_length": 3}},
            "max_length is no argument of the template",
        ),
        ({"system": ""}, "empty; write some text"),
        ({"system": "half \ud83d"}, r"half a character \(a lone surrogate\) at place 6"),
        ({"completion_texts": ["fine", "\udc00"]}, "half a character"),
    ],
)
def test_fields_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source("r.jsonl", **fields)


# ---- the same prompt


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_what_is_normal_stays_so_and_knows_no_blanks(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert normalize_text(f"  {text}\n") == once
    assert normalize_text(text.replace(" ", "\t ")) == once


@pytest.mark.parametrize(
    "other",
    ["how do i pick a lock", "How do I pick a lock?", " How  do I\tpick a lock ? ", "HOW DO I PICK A LOCK...",
     "Ｈow do I pick a lock？", "How do I\u00a0pick a lock!"],
)  # fmt: skip
def test_wordings_that_are_one_prompt(other: str) -> None:
    assert normalize_text(other) == "how do i pick a lock"


def test_prompts_that_differ_stay_apart() -> None:
    texts = ["3-5", "3 5", "35", "3+5", "what is 3?", "is 3 what?", "naïve", "naive"]
    assert len({normalize_text(t) for t in texts}) == len(texts)


def test_a_conversation_is_the_string_that_it_wraps() -> None:
    assert identity_of((SYSTEM, {"role": "user", "content": " Hi? "})) == identity_of("hi")
    assert identity_of((HI, HELLO, HI)) != identity_of((HI,))


def test_a_wording_never_stands_on_both_sides_of_a_split(tmp_path: Path) -> None:
    rows = [
        {"prompt": text.format(i)}
        for i, text in product(range(60), ("Pick lock {}.", "pick lock {}", "PICK  LOCK {} ?"))
    ]
    path = write(tmp_path / "r.jsonl", *rows)
    sides = [
        {normalize_text(r.text) for r in read_dataset(source(path, heldout_share=0.3, part=part))}
        for part in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 60
    assert min(map(len, sides)) > 8


def test_the_split_of_different_prompts_is_that_of_their_hash(tmp_path: Path) -> None:
    """As it always was: SHA-256 of the prompt as it is written."""
    rows = [{"prompt": f"How do I Pick lock {i}?"} for i in range(12)]
    path = write(tmp_path / "r.jsonl", *rows)
    heldout = [r.text for r in read_dataset(source(path, heldout_share=0.4, part="heldout"))]
    assert heldout == [f"How do I Pick lock {i}?" for i in (3, 4, 7, 8, 11)]


def test_held_out_prompts_that_are_trained_on_are_counted_and_refused_from_half_on(tmp_path: Path) -> None:
    train = source(write(tmp_path / "train.jsonl", *({"prompt": f"How do I do {i}?"} for i in range(10))))
    for shared in (0, 1, 5, 6):
        texts = [f" how do i do {i}" for i in range(shared)] + [f"new {i}" for i in range(10 - shared)]
        heldout = source(
            write(tmp_path / "heldout.jsonl", *({"prompt": text} for text in [*texts, texts[-1]]))
        )
        if shared > MAX_OVERLAP * 10:
            with pytest.raises(
                ConfigError,
                match=r"data.heldout: 6 of 10 held-out prompts are training prompts too "
                r".*, more than the 50%",
            ):
                check_rows([train], [heldout])
        else:
            said = (
                f"{shared} of 10 held-out prompts are training prompts too (case, blanks and last mark aside)"
            )
            assert check_rows([train], [heldout]).notes == ((said,) if shared else ())


def test_overlap_of_nothing() -> None:
    assert measure_overlap([], ["a"]).shared == measure_overlap(["a"], []).shared == 0


def test_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *({"prompt": f"prompt {i}", "c": "x"} for i in range(1500)))
    told: list[int] = []
    assert (
        check_rows([source(path)], examples=[source(path, completion="c")], progress=told.append).rows == 3000
    )
    assert told == [1000, 2000, 3000]
    assert isinstance(next(read_dataset(source(path))), Row)
