"""Data sets: where prompts and completions come from."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from frpo.config.section import Content, PathText, Positive, PositiveFloat, Redoes, Section, Share

TEMPLATE_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+")

OF_THE_CALL = {
    "add_generation_prompt", "continue_final_message", "conversation", "max_length", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
    "truncation",
}  # fmt: skip
"""Arguments of transformers' apply_chat_template that are not the template's own."""


def split_template(template: str) -> list[tuple[str, str]]:
    """A prompt template as (text, column) in turn, one of the two empty; doubled braces are braces. Raises
    ValueError."""
    parts = []
    for match in TEMPLATE_PIECE.finditer(template):
        text = match[0]
        column = match[1]
        if text in ("{", "}"):
            raise ValueError(
                f"{text!r} at character {match.start() + 1} has no partner; write {text * 2} for a brace of "
                "the text"
            )
        if column:
            parts.append(("", column))
        elif text in ("{{", "}}"):
            parts.append((text[0], ""))
        else:
            parts.append((text, ""))
    return parts


class DatasetConfig(Section):
    path: Annotated[PathText, Content("data")]
    """.jsonl, .csv or .parquet file (.gz too), a folder of such files as the hub's download leaves it, a
    saved Hugging Face data set, a hub name, testbed:<name>, or reasoning_gym:<task>?size=1000&seed=0 (any
    setting of the task; extra `gym`)."""
    subset: str | None = None
    """Configuration of a hub data set or its folder that has several (openai/gsm8k: main, socratic)."""
    split: str | None = None
    """Split of a folder or a hub data set; null: train, or the only one."""
    prompt: str = "prompt"
    """Column with the prompt: a string, or chat messages (role, content). Or a template of columns, braces
    doubled where they are meant: 'Answer as {{"answer": ...}}: {Body} {Question}'."""
    completion: str | None = None
    """Column with the completion, for supervised fine-tuning: a string, or one assistant message. Null:
    prompts alone, or for fine-tuning the last turn of the conversation in `prompt`."""
    completion_texts: tuple[str, ...] = ()
    """Fixed completions instead of a column: each row takes one, chosen by a hash of its prompt."""
    task: str | None = None
    """Label of every row; it routes rewards and mixes data sets."""
    task_column: str | None = None
    """Column to take the label from instead."""
    where: dict[str, str] = {}
    """Keep only rows whose column equals the value."""
    heldout_share: Share = 0.0
    """Share of rows, by a hash of the prompt, that is kept for evaluation and never trained on. Prompts that
    differ in case, blanks, Unicode form or last punctuation alone stay on one side."""
    part: Literal["all", "train", "heldout"] = "all"
    """Which side of that split to read."""
    chat: bool = False
    """Wrap string prompts as a user message and apply the tokenizer's chat template."""
    system: str | None = None
    """System prompt of the rows that have none; string prompts become chats."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as {enable_thinking: false}."""
    limit: Positive | None = None
    """Read at most this many rows."""

    @field_validator("prompt")
    @classmethod
    def _closed(cls, prompt: str) -> str:
        split_template(prompt)
        return prompt

    @field_validator("prompt", "system", "completion_texts")
    @classmethod
    def _sayable(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        for text in texts or ():
            if not text.strip():
                raise ValueError("empty; write some text, or leave the field out")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"half a character (a lone surrogate) at place {error.start + 1}; write the whole "
                    "character"
                ) from None
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _of_the_template(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if mine := sorted(OF_THE_CALL & set(arguments)):
            raise ValueError(f"{mine[0]} is no argument of the template: frpo sets it itself; leave it out")
        return arguments

    @model_validator(mode="after")
    def _one_task(self) -> DatasetConfig:
        if (self.task is None) == (self.task_column is None):
            raise ValueError("give exactly one of task (a label) and task_column (a column that holds it)")
        if self.completion and self.completion_texts:
            raise ValueError("give completion (a column) or completion_texts (fixed answers), not both")
        if self.part != "all" and self.heldout_share == 0:
            raise ValueError(f"part: {self.part} needs heldout_share > 0")
        return self


class DataConfig(Section):
    train: Annotated[tuple[DatasetConfig, ...], Redoes(("rlhf",))] = ()
    """Prompts of the rlhf stage; none where there are no arms."""
    heldout: tuple[DatasetConfig, ...] = Field(min_length=1)
    """Prompts of validation and evaluation; never trained on. Refused when more than half of them are
    training prompts too."""
    mix: Annotated[dict[str, PositiveFloat], Redoes(("rlhf",))] = {}
    """Weight of each task in a batch; empty: by number of rows."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are dropped and counted, never cut."""
