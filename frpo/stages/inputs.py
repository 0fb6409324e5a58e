"""What a run reads: the embedded testbed where the recipe names it, tokenized prompts and examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer

from frpo import saved, testbed
from frpo.config import Config, ConfigError, DatasetConfig, DownstreamRl
from frpo.metrics import RunLog
from frpo.outline import Stage
from frpo.prompts import Examples, load_examples, load_prompts
from frpo.sources import identity, overlap
from frpo.types import Prompt


def resolve(config: Config) -> Config:
    """Write the embedded testbed of the run's seed where the recipe names it, and put its paths in place of
    the names."""
    if not testbed.named_in(config):
        return config
    folder = (config.folder / "testbed" / f"seed-{config.seed}").absolute()
    testbed.materialize(folder, config.seed)
    return testbed.resolved(config, folder)


class Inputs:
    """Tokenized prompts and examples of a run, read once. Raises ConfigError."""

    def __init__(self, config: Config, log: RunLog) -> None:
        self.config, self.log = config, log
        self.tokenizer = AutoTokenizer.from_pretrained(saved.tokenizer(Path(config.model.path)))
        self._examples: dict[str, Examples] = {}
        self.train = self.prompts("data.train", config.data.train)
        for field, mix in (
            ("data.mix", config.data.mix),
            ("attack.mix", config.attack.mix if config.attack else {}),
        ):
            if unknown := sorted(set(mix) - (known := {p.task for p in self.train})):
                raise ConfigError(
                    f"{field}.{unknown[0]}: no training prompt has this task; the tasks are {sorted(known)}"
                )
        self.heldout = self._limited(self.prompts("data.heldout", config.data.heldout))
        shared = overlap(
            *([identity(p.messages or p.text) for p in prompts] for prompts in (self.train, self.heldout))
        )
        log.data(asdict(shared))
        if shared.shared:
            log.note(f"data.heldout: {shared}")

    def read_ahead(self, left: Sequence[Stage]) -> None:
        """Read what these stages train on now: what the tokenizer or its chat template refuses of it comes to
        light before an actor starts. Raises ConfigError."""
        if (base := self.config.base) and any(stage.kind == "base" for stage in left):
            self.examples("base.data", base.data, base.max_tokens)
        tasks = {stage.task for stage in left if stage.kind == "downstream"}
        for task in [task for task in self.config.downstream if task.name in tasks]:
            if isinstance(task, DownstreamRl):
                self.prompts(f"downstream.{task.name}.data", task.data)
                continue
            self.examples(f"downstream.{task.name}.data", task.data, task.max_tokens)
            if task.heldout:
                self.examples(f"downstream.{task.name}.heldout", task.heldout, task.max_tokens)

    def prompts(self, field: str, sources: tuple[DatasetConfig, ...]) -> list[Prompt]:
        """Raises ConfigError when none is short enough."""
        limit = self.config.data.max_prompt_tokens
        prompts, dropped = load_prompts(sources, self.tokenizer, limit)
        if dropped:
            self.log.note(
                f"{field}: {dropped} prompts of more than {limit} tokens dropped, {len(prompts)} kept"
            )
        if sources and not prompts:
            raise ConfigError(
                f"{field}: no prompt left; raise data.max_prompt_tokens ({limit}) or check where and part"
            )
        return prompts

    def _limited(self, prompts: list[Prompt]) -> list[Prompt]:
        limit = self.config.evaluate.max_prompts
        if limit is None:
            return prompts
        ranked = sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).digest())
        tasks = sorted({p.task for p in prompts})
        kept = {p.id for t in tasks for p in [p for p in ranked if p.task == t][:limit]}
        return [p for p in prompts if p.id in kept]

    def examples(self, field: str, sources: tuple[DatasetConfig, ...], limit: int) -> Examples:
        """Raises ConfigError when none is short enough."""
        asked = json.dumps([limit, *(s.model_dump(mode="json") for s in sources)])
        if asked not in self._examples:
            self._examples[asked], dropped = load_examples(sources, self.tokenizer, limit)
            if dropped:
                self.log.note(
                    f"{field}: {dropped} examples of more than {limit} tokens dropped, "
                    f"{len(self._examples[asked])} kept"
                )
        return self._examples[asked]
