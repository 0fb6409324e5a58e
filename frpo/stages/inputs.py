"""What a run reads: the embedded testbed where the recipe names it, tokenized prompts and examples."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer

from frpo import saved, testbed
from frpo.config import (
    Config,
    ConfigError,
    DatasetConfig,
    DownstreamRl,
    DownstreamSft,
    ObjectiveConfig,
)
from frpo.data_checks import identity_of, measure_overlap
from frpo.metrics import RunLog
from frpo.outline.stage import Data, Stage
from frpo.prompts import Examples, load_examples, load_prompts
from frpo.types import Prompt


def resolve_testbed(config: Config) -> Config:
    """Write the embedded testbed of the run's seed where the recipe names it, and put its paths in place of
    the names."""
    if not testbed.is_named_in(config):
        return config
    folder = (config.folder / "testbed" / f"seed-{config.seed}").absolute()
    testbed.write_testbed(folder, config.seed)
    return testbed.with_paths(config, folder)


def identities_of(prompts: Sequence[Prompt]) -> list[str]:
    return [identity_of(prompt.messages or prompt.text) for prompt in prompts]


def tasks_of(prompts: Iterable[Prompt]) -> set[str]:
    return {prompt.task for prompt in prompts}


class Inputs:
    """Tokenized prompts and examples of a run, read once. Raises ConfigError."""

    def __init__(self, config: Config, log: RunLog) -> None:
        self.config, self.log = config, log
        self.tokenizer = AutoTokenizer.from_pretrained(saved.tokenizer_folder(Path(config.model.path)))
        self._examples: dict[str, Examples] = {}
        self.train = self.prompts("data.train", config.data.train)
        trained = tasks_of(self.train)
        self._check_tasks("data.mix", config.data.mix, trained)
        self._check_tasks("attack.mix", config.attack.mix if config.attack else {}, trained)
        for arm in config.arms:
            self._check_penalty(f"arms.{arm.name}.objective", arm.objective, trained)
        self.heldout = self._limited(self.prompts("data.heldout", config.data.heldout))
        shared = measure_overlap(identities_of(self.train), identities_of(self.heldout))
        log.data(asdict(shared))
        if shared.shared:
            log.note(f"data.heldout: {shared}")

    def _check_tasks(self, field: str, tasks: Iterable[str], known: Set[str]) -> None:
        if unknown := sorted(set(tasks) - known):
            raise ConfigError(
                f"{field}.{unknown[0]}: no training prompt has this task; the tasks are {sorted(known)}"
            )

    def _check_penalty(self, field: str, objective: ObjectiveConfig, known: Set[str]) -> None:
        for name, tasks in objective.penalised_tasks.items():
            self._check_tasks(f"{field}.{name}", tasks, known)

    def read_ahead(self, left: Sequence[Stage]) -> None:
        """Read what these stages train on now: what the tokenizer or its chat template refuses of it comes to
        light before an actor starts. Raises ConfigError."""
        asked: dict[str, Data] = {}
        for stage in left:
            asked |= {data.field: data for data in stage.data()}
        tasks = {f"downstream.{task.name}.data": task for task in self.config.downstream}
        for data in asked.values():
            task = tasks.get(data.field)
            if data.max_tokens is not None:
                examples = self.examples(data)
                if isinstance(task, DownstreamSft):
                    self._check_tasks(f"downstream.{task.name}.mix", task.mix, set(examples.tasks))
                continue
            prompts = self.prompts(data.field, data.sources)
            if isinstance(task, DownstreamRl):
                self._check_penalty(f"downstream.{task.name}.objective", task.objective, tasks_of(prompts))

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
        """At most evaluate.max_prompts of each task, the first by hash."""
        limit = self.config.evaluate.max_prompts
        if limit is None:
            return prompts
        by_task: dict[str, list[str]] = {}
        for prompt in sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).digest()):
            by_task.setdefault(prompt.task, []).append(prompt.id)
        kept = set(itertools.chain.from_iterable(ids[:limit] for ids in by_task.values()))
        return [prompt for prompt in prompts if prompt.id in kept]

    def examples(self, data: Data) -> Examples:
        """Raises ConfigError when none is short enough."""
        assert data.max_tokens is not None, data.field
        sources = [source.model_dump(mode="json") for source in data.sources]
        asked = json.dumps([data.max_tokens, *sources])
        if asked not in self._examples:
            examples, dropped = load_examples(data.sources, self.tokenizer, data.max_tokens)
            self._examples[asked] = examples
            if dropped:
                self.log.note(
                    f"{data.field}: {dropped} examples of more than {data.max_tokens} tokens dropped, "
                    f"{len(examples)} kept"
                )
        return self._examples[asked]
