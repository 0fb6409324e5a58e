"""What a run needs of the machine or cluster that it starts on, and what this machine is short of.

Imports no ML library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from frpo import saved
from frpo.config import Config, find_cluster
from frpo.forecast import (
    CARDS,
    Card,
    Judges,
    Need,
    estimate_host_needs,
    estimate_judges_on_host,
    say_judges_too_large,
    say_too_much,
    sum_host_gib,
)
from frpo.model_checks import weight_bytes
from frpo.outline import fixed_end, list_stages
from frpo.planning import Plan, judges_of
from frpo.shape import EMBEDDED, Shape, shape_of


def runs_elsewhere(config: Config) -> bool:
    """Whether the actors run in a cluster that is up already, maybe on other machines than this one."""
    return find_cluster(config.cluster.address) is not None


def find_nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def list_missing_resources(config: Config, asked: Plan) -> list[str]:
    """What this machine is short of, one line each; empty when a cluster is joined (it is asked at the
    start)."""
    problems: list[str] = []
    sizes = read_shape(config)
    if not runs_elsewhere(config):
        problems += _list_lacking_devices(asked)
        if sizes:
            problems += _list_lacking_memory(config, sizes, asked)
    gpu = find_card(config)
    if gpu and sizes and asked.num_gpus > 0:
        problems += say_too_much(config, sizes, gpu, asked)
    if gpu:
        problems += say_judges_too_large(read_judges(config), gpu)
    parent = find_nearest_folder(config.folder)
    free = shutil.disk_usage(parent).free
    written = disk_bytes(config)
    if written > free:
        problems.append(
            f"disk: the run may need {written / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free; "
            "choose another run_dir"
        )
    return problems


def _list_lacking_devices(asked: Plan) -> Iterator[str]:
    cpus = os.cpu_count() or 1
    if asked.num_cpus > cpus:
        yield (
            f"CPUs: the plan needs {asked.num_cpus:g}, this machine has {cpus}; lower num_workers or "
            "num_cpus, or join a cluster"
        )
    there = count_gpus()
    if asked.num_gpus > there:
        yield (
            f"GPUs: the plan needs {asked.num_gpus:g}, this machine has {there}; lower num_gpus, or join "
            "a cluster (cluster.address)"
        )


def _list_lacking_memory(config: Config, sizes: Shape, asked: Plan) -> Iterator[str]:
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    need = sum_host_gib(estimate_host(config, sizes, asked), asked)
    if need > have:
        yield (
            f"memory: the actors may need {need:.1f} GiB together, this machine has {have:.1f} GiB; "
            "lower learner.micro_batch_tokens or rollout.kv_cache_gib, train adapters (model.lora), or join "
            "a cluster"
        )


def count_gpus() -> int:
    return len(list_gpus())


def list_gpus() -> list[str]:
    """The names of this machine's."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]


def find_card(config: Config) -> Card | None:
    """The card that the run is planned for: the one named, or this machine's first where it is one that we
    know."""
    if config.cluster.gpu:
        return CARDS[config.cluster.gpu]
    here = [] if runs_elsewhere(config) else list_gpus()
    return _card_of(here[0]) if here else None


def _card_of(name: str) -> Card | None:
    """By what nvidia-smi calls it, such as NVIDIA A100-SXM4-80GB."""
    for card in CARDS.values():
        if all(part in name for part in card.name.split("-")):
            return card
    return None


def read_shape(config: Config) -> Shape | None:
    """Of the model, where its config.json is here."""
    if config.model.path == "testbed:model":
        return shape_of(EMBEDDED)
    file = saved.base_of(Path(config.model.path)) / "config.json"
    return shape_of(saved.read_json(file)) if file.is_file() else None


def read_judges(config: Config) -> Judges:
    """Those whose config.json is here, by role."""
    judges = {}
    for role, judge in judges_of(config).items():
        file = Path(judge.path) / "config.json"
        sizes = shape_of(saved.read_json(file)) if file.is_file() else None
        if sizes:
            judges[role] = (judge, sizes)
    return judges


def estimate_host(config: Config, sizes: Shape, asked: Plan) -> list[Need]:
    """Host memory of one actor of each role, judges included."""
    return [*estimate_host_needs(config, sizes, asked), *estimate_judges_on_host(read_judges(config))]


def disk_bytes(config: Config) -> int:
    """Upper estimate of what a run writes, where the model's size is known (a folder); else 0."""
    size = weight_bytes(config.model)
    kept = config.checkpoint.keep_last + 1
    # the last of each stage that could go on
    kept += sum(not fixed_end(stage) for stage in list_stages(config))
    fine_tuned = max(1, len(config.arms)) * len(config.downstream)
    if all(config.model_of(task).lora for task in (config.learner, *config.downstream)):
        whole = fine_tuned if config.model.dtype == "float32" else 0  # else adapters are written
        return size * (2 + whole) + size // 4 * kept
    policies = len(config.arms) + fine_tuned + (config.base is not None)
    # weights, and float32 master weights and two moments of each: the weights are their own masters in
    # float32
    checkpoint = 4 if config.model.dtype == "float32" else 7
    return size * policies + checkpoint * size * kept
