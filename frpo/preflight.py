"""Everything that can be found wrong before something expensive starts: files, columns, functions, folders.

Imports no ML library. `check` raises at the first mistake; `frpo.resources` tells what a machine is
short of.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from frpo import data_checks, models, sources
from frpo.config import (
    Config,
    ConfigError,
    DatasetConfig,
    DownstreamRl,
    FunctionReward,
    JudgeReward,
    Missing,
    ModelReward,
    RewardConfig,
    ServeReward,
    UrlReward,
)
from frpo.harness import check_files
from frpo.model_checks import check_judge, check_policy, check_reward_model
from frpo.resources import find_nearest_folder, runs_elsewhere
from frpo.rewards.loading import load_function
from frpo.rewards.signature_checks import check_signature
from frpo.rewards.template import check_asked_columns, load_template
from frpo.secrets import secrets_of


def check_run(config: Config, progress: Callable[[int], None] = lambda count: None) -> data_checks.Checked:
    """Raises ConfigError naming field or row, value and remedy; Missing where nothing is wrong but this
    machine lacks something. Returns what reading the data has found."""
    check_policy(config)
    absent: list[str] = []
    looks = (
        check_attention,
        _check_runs_rewards,
        check_served_rewards,
        check_engine,
        check_trackers,
        check_extra,
    )
    for look in looks:
        try:
            look(config)
        except Missing as error:  # what is wrong is said first
            absent.append(str(error))
    checked = check_data(config, progress)
    check_tasks(config)
    if config.harness:
        check_files(config.harness)
    check_columns(config)
    check_folder(config.folder)
    if absent:
        raise Missing("\n".join(absent))
    return checked


def check_data(config: Config, progress: Callable[[int], None]) -> data_checks.Checked:
    """Every row of every data set, but for the testbed's own, which a run makes."""
    prompts: list[DatasetConfig] = []
    examples: list[DatasetConfig] = list(config.base.data) if config.base else []
    for task in config.downstream:
        if isinstance(task, DownstreamRl):
            prompts += task.data
        else:
            examples += task.sources
    if config.audit:
        examples += config.audit.harmful
    every = (config.data.train, config.data.heldout, prompts, examples)
    return data_checks.check_rows(*map(_drop_doubles, every), progress=progress)


def _drop_doubles(asked: Iterable[DatasetConfig]) -> list[DatasetConfig]:
    """Different data sets, without the testbed's."""
    by_content = {source.model_dump_json(): source for source in asked}
    return [source for source in by_content.values() if not source.path.startswith("testbed:")]


def make_ready(
    config: Config,
    *,
    progress: Callable[[int], None] = lambda count: None,
    note: Callable[[str], None] = lambda text: None,
) -> Config:
    """The configuration, checked, with folders in place of hub names. All that can be found wrong without the
    models is found before one is downloaded. `note` is told what is right but worth knowing. Raises
    ConfigError."""
    cached, uncached = models.find_cached_models(config)
    for text in check_run(cached, progress).notes:
        note(text)
    if not uncached:
        return cached
    resolved = models.resolve_models(config)
    check_run(resolved)
    return resolved


def _check_runs_rewards(config: Config) -> None:
    check_rewards(config.rewards)


def check_rewards(rewards: Sequence[RewardConfig]) -> None:
    """That functions and templates are there and may run, model folders are whole, and the secrets that are
    named are here."""
    for i, reward in enumerate(rewards):
        if isinstance(reward, FunctionReward):
            _check_function(reward, f"rewards.{i}")
        elif isinstance(reward, ModelReward):
            check_reward_model(f"rewards.{i}.path", reward.path)
        elif isinstance(reward, JudgeReward):
            template = load_template(reward, f"rewards.{i}.template")
            check_judge(f"rewards.{i}", reward, chats=bool(template.user))
        elif isinstance(reward, UrlReward):
            check_urls(f"rewards.{i}.urls", reward)
    secrets_of(rewards)


def _check_function(reward: FunctionReward, where: str) -> None:
    function = load_function(reward.function, f"{where}.function")
    check_signature(reward, None, where)
    own_check = getattr(function, "check", None)  # what a reward function itself needs
    if own_check:
        try:
            own_check(reward.arguments)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None


def check_served_rewards(config: Config) -> None:
    """That a reward that is served in the run's own cluster has one to be in."""
    if runs_elsewhere(config):
        return
    for i, reward in enumerate(config.rewards):
        if isinstance(reward, ServeReward):
            raise Missing(
                f"rewards.{i}.kind: serve needs the Ray cluster of the service; give cluster.address, or "
                "submit the run there as a job, or use kind: url"
            )


ONE_CARD = (
    "rollout.num_gpus, learner.num_gpus, reference.num_gpus and evaluate.num_gpus to 1 and rollout.sleep to "
    "true (one card for all)"
)


def check_engine(config: Config) -> None:
    """That the vLLM that is installed here runs where the engines are to: its CUDA build has no kernels for
    the CPU."""
    if runs_elsewhere(config):
        return
    remedies = {"rollout": ONE_CARD} if config.rollout.num_gpus == 0 else {}
    for i, reward in enumerate(config.rewards):
        if isinstance(reward, JudgeReward) and reward.num_gpus == 0:
            remedies[f"rewards.{i}"] = "it to a GPU, or a share of one"
    for where, remedy in remedies.items():
        with contextlib.suppress(PackageNotFoundError):
            raise Missing(
                f"{where}.num_gpus: 0, and vllm {version('vllm')} runs on GPUs alone; set {remedy}, or "
                "install the CPU build (FRPO_ACCELERATOR=cpu deploy/install.sh)"
            )


def check_extra(config: Config) -> None:
    """That the packages of the extra `eval` are here, where the recipe asks for what they do."""
    asked = {}
    if config.harness:
        asked["lm_eval"] = "harness: lm-evaluation-harness"
    for i, reward in enumerate(config.rewards):
        if isinstance(reward, FunctionReward) and reward.function == "frpo.rewards:boxed_math":
            asked["math_verify"] = f"rewards.{i}.function: math-verify"
    for module, what in asked.items():
        if importlib.util.find_spec(module) is None:
            raise Missing(f"{what} is not installed; pip install 'frpo[eval]', or leave it out")


def check_trackers(config: Config) -> None:
    """That the libraries of the trackers that are asked for are here, and that MLflow is told where to
    write."""
    for field, library in (("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")):
        if getattr(config, field) and importlib.util.find_spec(library) is None:
            raise Missing(
                f"{field}: {library} is not installed; pip install 'frpo[tracking]', or leave it out"
            )
    if config.mlflow_experiment and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise Missing(
            "mlflow_experiment: MLFLOW_TRACKING_URI is not set; export the address of the server, such as "
            "http://127.0.0.1:5000, where you start frpo"
        )


PORTS = {"http": 80, "https": 443}


def check_urls(field: str, reward: UrlReward) -> None:
    """That one of the addresses takes a connection."""
    for url in reward.urls:
        place = urllib.parse.urlsplit(url)
        port = place.port or PORTS[place.scheme]
        try:
            socket.create_connection((place.hostname or "", port), timeout=2).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
    raise Missing(
        f"{field}: {', '.join(reward.urls)}: no connection ({reason}); start the service, or mend the address"
    )


def check_attention(config: Config) -> None:
    """That the attention has a GPU, and flash attention 2 its package where that is this machine's."""
    attention = config.model.attention
    if attention not in ("flash_attention_2", "flex_attention"):
        return
    if config.learner.num_gpus == 0:
        raise ConfigError(
            f"model.attention: {attention} runs on a GPU, and learner.num_gpus is 0; use sdpa, or give the "
            "learner a GPU"
        )
    if attention != "flash_attention_2" or runs_elsewhere(config):
        return
    if importlib.util.find_spec("flash_attn") is None:
        raise Missing(
            "model.attention: flash_attention_2 needs the package flash_attn, which is not installed; use "
            "sdpa, or install it"
        )


ROWS_LOOKED_AT = 1000
"""Of a data set: the columns that any of them has are what the rewards of its task are called with."""


def list_scored(config: Config) -> list[DatasetConfig]:
    """The data sets whose completions are scored."""
    datasets = [*config.data.train, *config.data.heldout]
    for task in config.downstream:
        if isinstance(task, DownstreamRl):
            datasets += task.data
    return datasets


def check_columns(config: Config) -> None:
    """That each reward function can be called, and each judge be asked, with the columns of the rows that it
    scores."""
    asking = [(i, r) for i, r in enumerate(config.rewards) if isinstance(r, FunctionReward | JudgeReward)]
    if not asking:
        return
    for source in _drop_doubles(list_scored(config)):
        rows = _sample_rows(source)
        for (i, reward), (task, row) in itertools.product(asking, rows.items()):
            if reward.tasks and task not in reward.tasks:
                continue
            if isinstance(reward, FunctionReward):
                check_signature(reward, row.columns, f"rewards.{i}", row.where)
            else:
                field = f"rewards.{i}.template"
                check_asked_columns(
                    load_template(reward, field), row.columns, f"{field}: {reward.template}", row.where
                )


def _sample_rows(source: DatasetConfig) -> dict[str, sources.Row]:
    """The first row of each task, with the columns that any row of it has."""
    by_task: dict[str, sources.Row] = {}
    for row in itertools.islice(sources.read_dataset(source), ROWS_LOOKED_AT):
        first = by_task.get(row.task, row)
        by_task[row.task] = first._replace(columns={**row.columns, **first.columns})
    return by_task


def check_tasks(config: Config) -> None:
    """Fixed task labels that no reward or no data set knows."""
    labels = {source.task for source in list_scored(config)}
    if None in labels:
        return
    for i, reward in enumerate(config.rewards):
        for task in reward.tasks:
            if task not in labels:
                raise ConfigError(
                    f"rewards.{i}.tasks: no data set has the task {task!r}; they have "
                    f"{sorted(map(str, labels))}"
                )
    for label in labels:
        if not any(not reward.tasks or label in reward.tasks for reward in config.rewards):
            raise ConfigError(f"rewards: none applies to the task {label!r}; add it to a reward's tasks")


def check_folder(folder: Path) -> None:
    try:
        parent = find_nearest_folder(folder)
    except OSError as error:  # a name that is too long
        raise ConfigError(
            f"run_dir: {folder} cannot be a folder ({error.strerror}); choose another"
        ) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(
            f"run_dir: {folder} cannot be written ({parent} is not a writable folder); choose another"
        )
