"""Data sets: where prompts and completions come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from frpo.config.section import PathText, Positive, PositiveFloat, Section, Share


class DatasetConfig(Section):
    path: PathText
    """.jsonl, .csv or .parquet file (.gz too), a Hugging Face data set folder or hub name, testbed:<name>, or
    reasoning_gym:<task>?size=1000&seed=0 (any setting of the task; extra `gym`)."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    prompt: str = "prompt"
    """Column with the prompt: a string, or chat messages (role, content). Or a template of columns: "{Body} {Question}"."""
    completion: str | None = None
    """Column with the completion, for supervised fine-tuning; None for prompts alone."""
    completion_texts: tuple[str, ...] = ()
    """Fixed completions instead of a column: each row takes one, chosen by a hash of its prompt."""
    task: str | None = None
    """Label of every row; it routes rewards and mixes data sets."""
    task_column: str | None = None
    """Column to take the label from instead."""
    where: dict[str, str] = {}
    """Keep only rows whose column equals the value."""
    heldout_share: Share = 0.0
    """Share of rows, by a hash of the prompt, that is kept for evaluation and never trained on."""
    part: Literal["all", "train", "heldout"] = "all"
    """Which side of that split to read."""
    chat: bool = False
    """Wrap string prompts as a user message and apply the tokenizer's chat template."""
    limit: Positive | None = None
    """Read at most this many rows."""

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
    train: tuple[DatasetConfig, ...]
    """Prompts of the rlhf stage."""
    heldout: tuple[DatasetConfig, ...] = Field(min_length=1)
    """Prompts of validation and evaluation; never trained on."""
    mix: dict[str, PositiveFloat] = {}
    """Weight of each task in a batch; empty: by number of rows."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are dropped and counted, never cut."""
