"""Everything that can be found wrong before something expensive starts: files, columns, functions, folders,
resources.

Imports no ML library. `check` raises at the first mistake; `lacks` lists what the machine is short of.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import urllib.parse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from frpo import data_checks, models, saved, sources
from frpo.config import (
    Config,
    ConfigError,
    DatasetConfig,
    DownstreamRl,
    DownstreamSft,
    FunctionReward,
    Missing,
    ModelReward,
    RewardConfig,
    ServeReward,
    UrlReward,
)
from frpo.forecast import CARDS, Card, host_gib, host_needs, too_much
from frpo.harness import check_files
from frpo.model_checks import check_policy, check_reward_model, weight_bytes
from frpo.outline import fixed_end, outline
from frpo.planning import Plan
from frpo.rewards.loading import load_function
from frpo.rewards.signature_checks import check_signature
from frpo.secrets import secrets_of
from frpo.shape import EMBEDDED, Shape, shape_of


def check(config: Config, progress: Callable[[int], None] = lambda count: None) -> data_checks.Checked:
    """Raises ConfigError naming field or row, value and remedy; Missing where nothing is wrong but this
    machine lacks something. Returns what reading the data has found."""
    check_policy(config)
    absent: list[str] = []
    for look in (
        lambda: check_attention(config),
        lambda: check_rewards(config.rewards),
        lambda: check_cluster(config),
        lambda: check_engine(config),
    ):
        try:
            look()
        except Missing as error:  # what is wrong is said first
            absent.append(str(error))
    found = check_data(config, progress)
    check_tasks(config)
    if config.harness:
        check_files(config.harness)
    check_columns(config)
    check_folder(config.folder)
    if absent:
        raise Missing("\n".join(absent))
    return found


def check_data(config: Config, progress: Callable[[int], None]) -> data_checks.Checked:
    """Every row of every data set, but for the testbed's own, which a run makes."""
    downstream = config.downstream
    prompts = [s for d in downstream if isinstance(d, DownstreamRl) for s in d.data]
    examples = [
        *(config.base.data if config.base else ()),
        *(s for d in downstream if isinstance(d, DownstreamSft) for s in d.sources),
    ]
    every = (config.data.train, config.data.heldout, prompts, examples)
    return data_checks.check(*map(_once, every), progress=progress)


def _once(asked: Sequence[DatasetConfig]) -> list[DatasetConfig]:
    return list({s.model_dump_json(): s for s in asked if not s.path.startswith("testbed:")}.values())


def ready(
    config: Config,
    *,
    progress: Callable[[int], None] = lambda count: None,
    note: Callable[[str], None] = lambda text: None,
) -> Config:
    """The configuration, checked, with folders in place of hub names. All that can be found wrong without the
    models is found before one is downloaded. `note` is told what is right but worth knowing. Raises
    ConfigError."""
    found, uncached = models.cached(config)
    for text in check(found, progress).notes:
        note(text)
    if uncached:
        found = models.resolved(config)
        check(found)
    return found


def check_rewards(rewards: Sequence[RewardConfig]) -> None:
    """That functions are there and may run, model folders are whole, and the secrets that are named are
    here."""
    for i, reward in enumerate(rewards):
        if isinstance(reward, FunctionReward):
            function = load_function(reward.function, f"rewards.{i}.function")
            check_signature(reward, None, f"rewards.{i}")
            if check := getattr(function, "check", None):  # what a reward function itself needs
                try:
                    check(reward.arguments)
                except ConfigError as error:
                    raise ConfigError(f"rewards.{i}.{error}") from None
        elif isinstance(reward, ModelReward):
            check_reward_model(f"rewards.{i}.path", reward.path)
        elif isinstance(reward, UrlReward):
            check_urls(f"rewards.{i}.urls", reward)
    secrets_of(rewards)


def elsewhere(config: Config) -> bool:
    """Whether the actors run in a cluster that is up already, maybe on other machines than this one."""
    return bool(config.cluster.address) or "RAY_ADDRESS" in os.environ


def check_cluster(config: Config) -> None:
    """That a reward that is served in the run's own cluster has one to be in."""
    if elsewhere(config):
        return
    for i, reward in enumerate(config.rewards):
        if isinstance(reward, ServeReward):
            raise Missing(
                f"rewards.{i}.kind: serve needs the Ray cluster of the service; give cluster.address, or "
                "submit the run there as a job, "
                "or use kind: url"
            )


ONE_CARD = "rollout.num_gpus, learner.num_gpus, reference.num_gpus and evaluate.num_gpus to 1 and rollout.sleep to true (one card for all)"


def check_engine(config: Config) -> None:
    """That the vLLM that is installed here runs where the engines are to: its CUDA build has no kernels for
    the CPU."""
    if elsewhere(config) or config.rollout.num_gpus > 0:
        return
    with contextlib.suppress(PackageNotFoundError):
        raise Missing(
            f"rollout.num_gpus: 0, and vllm {version('vllm')} runs on GPUs alone; set {ONE_CARD}, or install "
            "the CPU build "
            "(FRPO_ACCELERATOR=cpu deploy/install.sh)"
        )


def check_urls(field: str, reward: UrlReward) -> None:
    """That one of the addresses takes a connection."""
    for url in reward.urls:
        place = urllib.parse.urlsplit(url)
        try:
            socket.create_connection(
                (place.hostname or "", place.port or (443 if place.scheme == "https" else 80)), timeout=2
            ).close()
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
    if (
        attention == "flash_attention_2"
        and not elsewhere(config)
        and importlib.util.find_spec("flash_attn") is None
    ):
        raise Missing(
            "model.attention: flash_attention_2 needs the package flash_attn, which is not installed; use "
            "sdpa, or install it"
        )


ROWS_LOOKED_AT = 1000
"""Of a data set: the columns that any of them has are what the rewards of its task are called with."""


def scored(config: Config) -> list[DatasetConfig]:
    """The data sets whose completions are scored."""
    downstream = [s for d in config.downstream if isinstance(d, DownstreamRl) for s in d.data]
    return [*config.data.train, *config.data.heldout, *downstream]


def check_columns(config: Config) -> None:
    """That each reward function can be called with the columns of the rows that it scores."""
    functions = [(i, r) for i, r in enumerate(config.rewards) if isinstance(r, FunctionReward)]
    for source in _once(scored(config)) if functions else ():
        first: dict[str, sources.Row] = {}
        for row in itertools.islice(sources.read_rows(source), ROWS_LOOKED_AT):
            known = first.setdefault(row.task, row)
            first[row.task] = known._replace(columns={**row.columns, **known.columns})
        for (i, reward), (task, row) in itertools.product(functions, first.items()):
            if not reward.tasks or task in reward.tasks:
                check_signature(reward, row.columns, f"rewards.{i}", row.where)


def check_tasks(config: Config) -> None:
    """Fixed task labels that no reward or no data set knows."""
    labels = {s.task for s in scored(config)}
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
        if not any(not r.tasks or label in r.tasks for r in config.rewards):
            raise ConfigError(f"rewards: none applies to the task {label!r}; add it to a reward's tasks")


def check_folder(folder: Path) -> None:
    try:
        parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    except OSError as error:  # a name that is too long
        raise ConfigError(
            f"run_dir: {folder} cannot be a folder ({error.strerror}); choose another"
        ) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(
            f"run_dir: {folder} cannot be written ({parent} is not a writable folder); choose another"
        )


def lacks(config: Config, asked: Plan) -> list[str]:
    """What this machine is short of, one line each; empty when a cluster is joined (it is asked at the
    start)."""
    found = []
    if not elsewhere(config):
        cpus, gpus = os.cpu_count() or 1, num_gpus()
        if asked.num_cpus > cpus:
            found.append(
                f"CPUs: the plan needs {asked.num_cpus:g}, this machine has {cpus}; lower num_workers or "
                "num_cpus, or join a cluster"
            )
        if asked.num_gpus > gpus:
            found.append(
                f"GPUs: the plan needs {asked.num_gpus:g}, this machine has {gpus}; lower num_gpus, or join "
                "a cluster (cluster.address)"
            )
    here, sizes = card(config), shape(config)
    if sizes and not elsewhere(config):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if (need := host_gib(host_needs(config, sizes, asked), asked)) > have:
            found.append(
                f"memory: the actors may need {need:.1f} GiB together, this machine has {have:.1f} GiB; "
                "lower learner.micro_batch_tokens or "
                "rollout.kv_cache_gib, train adapters (model.lora), or join a cluster"
            )
    found += too_much(config, sizes, here, asked) if here and sizes and asked.num_gpus > 0 else []
    parent = next(p for p in (config.folder.absolute(), *config.folder.absolute().parents) if p.exists())
    free, written = shutil.disk_usage(parent).free, disk_bytes(config)
    if written > free:
        found.append(
            f"disk: the run may need {written / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free; "
            "choose another run_dir"
        )
    return found


def num_gpus() -> int:
    return len(gpus())


def gpus() -> list[str]:
    """The names of this machine's."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]


def card(config: Config) -> Card | None:
    """The card that the run is planned for: the one named, or this machine's first where it is one that we
    know."""
    if config.cluster.gpu:
        return CARDS[config.cluster.gpu]
    name = "" if elsewhere(config) else next(iter(gpus()), "")
    return next((c for c in CARDS.values() if all(part in name for part in c.name.split("-"))), None)


def shape(config: Config) -> Shape | None:
    """Of the model, where its config.json is here."""
    if config.model.path == "testbed:model":
        return shape_of(EMBEDDED)
    file = saved.base(Path(config.model.path)) / "config.json"
    return shape_of(saved.read_json(file)) if file.is_file() else None


def disk_bytes(config: Config) -> int:
    """Upper estimate of what a run writes, where the model's size is known (a folder); else 0."""
    size = weight_bytes(config.model)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    kept += sum(not fixed_end(stage) for stage in outline(config))  # the last of each stage that could go on
    policies = len(config.arms) * (1 + len(config.downstream)) + (config.base is not None)
    if config.model.lora:
        whole = (
            len(config.arms) * len(config.downstream) if config.model.dtype == "float32" else 0
        )  # else adapters are written
        return size * (2 + whole) + size // 4 * kept
    # weights, and float32 master weights and two moments of each: the weights are their own masters in
    # float32
    checkpoint = 4 if config.model.dtype == "float32" else 7
    return size * policies + checkpoint * size * kept
