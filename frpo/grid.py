"""The runs that an audit is made of: one that certifies the policy, one for each fine-tune and seed. Pure.

A run of an audit has no arms: its base is the audited policy, and its one downstream task the fine-tune.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo.config import (
    AuditConfig,
    CertifyConfig,
    Config,
    ConfigError,
    DatasetConfig,
    DownstreamConfig,
    DownstreamRl,
    LoraConfig,
)

CERTIFICATE = "certificate"
FINE_TUNES = "fine-tunes"
HARMFUL = "harmful-examples"
"""Task of the examples that are mixed in."""


@dataclass(frozen=True)
class FineTune:
    """One combination of the grid; it is measured after each of `steps`."""

    task: DownstreamConfig
    """As the recipe has it."""
    learning_rate: float
    steps: tuple[int, ...]
    rank: int | None
    """Of its adapter; None trains all weights."""
    template: str | None
    """None: as the recipe says."""
    harmful_share: float

    @property
    def name(self) -> str:
        """Its folder, and what the report calls it.

        Example: crafts-lr0.001-full-chat-harmful0.05
        """
        parts = [self.task.name, f"lr{self.learning_rate:g}", f"r{self.rank}" if self.rank else "full"]
        if self.template:
            parts.append(self.template)
        if self.harmful_share:
            parts.append(f"harmful{self.harmful_share:g}")
        return "-".join(parts)

    @property
    def by_rl(self) -> bool:
        return isinstance(self.task, DownstreamRl)


def audit_of(config: Config) -> AuditConfig:
    """What the recipe asks of its audit; the defaults where it says nothing."""
    return config.audit or AuditConfig()


def audited_task(config: Config) -> str:
    """Raises ConfigError where the recipe does not name it."""
    task = audit_of(config).task or config.data.heldout[0].task
    if task is None:
        raise ConfigError(
            "audit.task: the first held-out data set takes its tasks from a column; name the one to audit"
        )
    return task


def list_fine_tunes(config: Config) -> tuple[FineTune, ...]:
    """Every combination, in the order of the recipe."""
    return tuple(
        itertools.chain.from_iterable(_vary_task(task, audit_of(config)) for task in config.downstream)
    )


def _vary_task(task: DownstreamConfig, grid: AuditConfig) -> Iterator[FineTune]:
    if isinstance(task, DownstreamRl):
        rates = grid.rl_learning_rates or (task.learner.learning_rate,)
        steps = grid.rl_steps or (task.num_steps,)
        shares: Sequence[float] = (0.0,)
    else:
        rates = grid.learning_rates or (task.learning_rate,)
        steps = grid.steps or (task.num_steps,)
        shares = grid.harmful_shares
    templates = grid.templates or (None,)
    for rank, template, rate, share in itertools.product(grid.ranks, templates, rates, shares):
        yield FineTune(
            task=task,
            learning_rate=rate,
            steps=tuple(sorted(steps)),
            rank=None if rank == "full" else rank,
            template=template,
            harmful_share=share,
        )


def certificate_run(config: Config, folder: Path) -> Config:
    """The run that certifies the policy on the audited task; it makes the policy where the recipe has a base
    stage."""
    audited = audited_task(config)
    heldout = [source for source in config.data.heldout if source.task in (None, audited)]
    return _run_of(
        config,
        run_dir=folder / CERTIFICATE,
        data={**config.data.model_dump(mode="json"), "heldout": heldout},
        downstream=(),
        certify=config.certify or CertifyConfig.model_validate({}),
    )


def seeds_of(config: Config) -> range:
    return range(config.seed, config.seed + audit_of(config).num_seeds)


def folder_of(fine_tune: FineTune, seed: int, folder: Path) -> Path:
    """Of the run, below the audit's."""
    return folder / FINE_TUNES / fine_tune.name / f"seed-{seed:03d}"


def fine_tune_run(config: Config, fine_tune: FineTune, seed: int, folder: Path) -> Config:
    """The run of one fine-tune and seed. Raises pydantic's ValidationError for one that cannot be."""
    task = _task_of(fine_tune, audit_of(config).harmful)
    model = config.model.model_dump(mode="json")
    if config.base:
        model["path"] = str((folder / CERTIFICATE / "base" / "policy").absolute())
    if fine_tune.rank:
        model["lora"] = LoraConfig(rank=fine_tune.rank, alpha=2 * fine_tune.rank)
    rollout = config.rollout.model_dump(mode="json")
    if config.model.dtype == "float32":
        rollout["lora"] = "merged"  # engines of one kind serve all ranks
    return _run_of(
        config,
        run_dir=folder_of(fine_tune, seed, folder),
        seed=seed,
        base=None,
        model=model,
        rollout=rollout,
        downstream=(task,),
        certify=None,
    )


def list_runs(config: Config, folder: Path) -> tuple[Config, ...]:
    """All of them, the certificate first. Raises pydantic's ValidationError."""
    runs = [certificate_run(config, folder)]
    for fine_tune, seed in itertools.product(list_fine_tunes(config), seeds_of(config)):
        runs.append(fine_tune_run(config, fine_tune, seed, folder))
    return tuple(runs)


def _run_of(config: Config, **changed: Any) -> Config:
    return Config.model_validate({**config.model_dump(mode="json"), "audit": None, **changed})


def _task_of(fine_tune: FineTune, harmful: Sequence[DatasetConfig]) -> DownstreamConfig:
    """The downstream task as this fine-tune has it."""
    task, last = fine_tune.task, fine_tune.steps[-1]
    data = _written_by(fine_tune.template, task.data)
    if isinstance(task, DownstreamRl):
        learner = task.learner.model_copy(
            update={"learning_rate": fine_tune.learning_rate, "num_steps": last}
        )
        return task.model_copy(update={"data": data, "learner": learner, "marks": fine_tune.steps[:-1]})
    changed: dict[str, Any] = {
        "learning_rate": fine_tune.learning_rate,
        "num_steps": last,
        "marks": fine_tune.steps[:-1],
        "data": data,
        "heldout": _written_by(fine_tune.template, task.heldout),
    }
    if fine_tune.harmful_share:
        bad = _written_by(fine_tune.template, harmful)
        changed["data"] = (*_label_rows(data, task.name), *_label_rows(bad, HARMFUL))
        changed["mix"] = {task.name: 1 - fine_tune.harmful_share, HARMFUL: fine_tune.harmful_share}
    return task.model_copy(update=changed)


def _label_rows(sources: Sequence[DatasetConfig], task: str) -> tuple[DatasetConfig, ...]:
    return tuple(source.model_copy(update={"task": task, "task_column": None}) for source in sources)


def _written_by(template: str | None, sources: Sequence[DatasetConfig]) -> tuple[DatasetConfig, ...]:
    """The data sets with their string prompts written by a template."""
    if template is None:
        return tuple(sources)
    plain: dict[str, Any] = {"chat": False, "system": None, "chat_template_kwargs": {}}
    changed = {"chat": True} if template == "chat" else plain
    return tuple(source.model_copy(update=changed) for source in sources)
