"""`frpo doctor`: what a run needs from this machine, and how to mend what is missing. One finding a line.

Heavy libraries are imported in processes of their own, with a time limit: a broken one says why instead of
taking the doctor down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from frpo import hub, joining, models, resources, saved
from frpo.config import Config, ConfigError
from frpo.model_checks import check_policy, weight_bytes

IMPORT_LIMIT_S = 180
CLUSTER_LIMIT_S = 60
LEAST_DISK_GIB = 5.0
LEAST_TMP_GIB = 3.0
LEAST_SHM_GIB = 1.0
LEAST_MEMORY_GIB = 6.0
ENGINES = {
    "vllm": "vllm",
    "deepspeed": "deepspeed",
    "ray": "ray",
    "ray serve": "ray.serve",
    "transformers": "transformers",
    "peft": "peft",
}


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    remedy: str = ""
    """What to do; empty where nothing is wrong."""


def examine(config: Config | None) -> Iterator[Finding]:
    """Cheap findings first. With a recipe also its folder, its cluster and its model."""
    uncached: list[hub.NotCached] = []
    address = os.environ.get("RAY_ADDRESS")
    if config:
        config, uncached = models.find_cached_models(config)
        address = config.cluster.address or address
    yield check_python()
    yield from check_versions()
    yield check_accelerators()
    yield from check_space(config)
    yield check_token()
    yield from check_engines()
    yield check_cluster(address)
    for error in uncached:
        if isinstance(error, hub.Offline):
            yield Finding("model", *str(error).split("; ", 1))
        else:
            yield Finding("model", str(error))
    if config and not hub.is_name(config.model.path):
        yield check_model(config)


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    right = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding("python", version, "" if right else "make the environment with Python 3.11 or 3.12")


def check_versions() -> Iterator[Finding]:
    """Installed packages against what frpo asks for, the engine's extra of this machine included."""
    for requirement in _strictest_requirements():
        name = f"{requirement.name} {requirement.specifier}".strip()
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", f"deploy/install.sh, or pip install '{name}'")
            continue
        fits = requirement.specifier.contains(version.split("+")[0], prereleases=True)
        remedy = "" if fits else f"frpo was run with {name}: pip install '{name}'"
        yield Finding(requirement.name, version, remedy)


def _strictest_requirements() -> list[Requirement]:
    """Of frpo and the extra of this machine; of a package that stands in several extras the strictest."""
    extra = "gpu" if resources.count_gpus() else "cpu"
    strictest: dict[str, Requirement] = {}
    asked = [Requirement(text) for text in metadata.requires("frpo") or []]
    for requirement in sorted(asked, key=lambda requirement: len(requirement.specifier)):
        marker = requirement.marker
        if not marker or marker.evaluate({"extra": ""}) or marker.evaluate({"extra": extra}):
            strictest[requirement.name] = requirement
    return list(strictest.values())


def check_accelerators() -> Finding:
    count = resources.count_gpus()
    if not count:
        return Finding("accelerators", "no NVIDIA GPU: everything runs on the CPU")
    asked = _ask_python("import torch; print(torch.cuda.device_count())", IMPORT_LIMIT_S)
    if asked.ok and asked.text == str(count):
        return Finding("accelerators", f"{count} GPUs")
    return Finding(
        "accelerators",
        f"{count} GPUs, torch sees {asked.text}",
        "install a CUDA build of torch: FRPO_ACCELERATOR=gpu deploy/install.sh",
    )


def check_space(config: Config | None) -> Iterator[Finding]:
    """On disk, in shared memory, in memory."""
    disk_gib = LEAST_DISK_GIB
    shared_gib = LEAST_SHM_GIB
    folder = Path("runs")
    if config:
        disk_gib = max(disk_gib, resources.disk_bytes(config) / 2**30)
        shared_gib = max(shared_gib, 0.5 + weight_bytes(config.model) / 2**30)
        folder = config.folder
    folder = folder.absolute()
    parent = next(above for above in (folder, *folder.parents) if above.exists())
    yield _check_room("disk", parent, disk_gib, "choose another --run-dir, or make room")
    yield check_ray_folder()
    shared = Path("/dev/shm")
    if shared.is_dir():
        remedy = "give the container more (docker run --shm-size): Ray's object store lies there"
        yield _check_room("shared memory", shared, shared_gib, remedy)
    import psutil

    memory = psutil.virtual_memory().available / 2**30
    remedy = "" if memory >= LEAST_MEMORY_GIB else f"a run needs about {LEAST_MEMORY_GIB:g} GiB"
    yield Finding("memory", f"{memory:.1f} GiB available", remedy)


def _check_room(what: str, folder: Path, need_gib: float, remedy: str) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    missing = "" if free >= need_gib else f"{need_gib:.1f} GiB are needed: {remedy}"
    return Finding(what, f"{free:.1f} GiB free in {folder}", missing)


def check_ray_folder() -> Finding:
    """Where a Ray that a run starts keeps its logs, its sockets and spilled objects."""
    try:
        folder = joining.find_temporary_folder()
    except ConfigError as error:
        return _finding_of("temporary folder", error)
    room = _check_room(
        "temporary folder", folder, LEAST_TMP_GIB, "make room: Ray keeps its logs and spilled objects there"
    )
    asked = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    if asked and not folder.is_relative_to(asked):
        return replace(room, found=f"{asked} is too long; Ray's sockets go to {folder}: {room.found}")
    return room


def check_token() -> Finding:
    """Of the Ray cluster; a run that starts its own Ray makes one for itself."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        return Finding(
            "token",
            "RAY_AUTH_MODE=disabled",
            "anybody who reaches the cluster's ports runs code there: set RAY_AUTH_MODE=token",
        )
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"]
    files = [Path(place).expanduser() for place in places if place]
    held = "RAY_AUTH_TOKEN" in os.environ or any(file.is_file() for file in files)
    if mode == "token" and "RAY_ADDRESS" in os.environ and not held:
        return Finding(
            "token",
            "RAY_AUTH_MODE=token without a token",
            "set RAY_AUTH_TOKEN to that of the head (ray get-auth-token there)",
        )
    return Finding("token", "held" if held else "none yet: a Ray that a run starts makes its own")


def check_engines() -> Iterator[Finding]:
    for what, module in ENGINES.items():
        asked = _ask_python(f"import {module}", IMPORT_LIMIT_S)
        if asked.ok:
            yield Finding(f"import {what}", "works")
        else:
            yield Finding(f"import {what}", asked.text, "deploy/install.sh installs what fits together")


def check_cluster(address: str | None) -> Finding:
    if address is None:
        return Finding("cluster", "none named: a run starts Ray on this machine")
    try:
        joining.refuse_unreachable(address, "cluster")
    except ConfigError as error:
        return _finding_of("cluster", error)
    code = (
        f"import ray; from frpo import joining; joining.connect({address!r}, 'cluster'); "
        "print(ray.cluster_resources())"
    )
    asked = _ask_python(code, CLUSTER_LIMIT_S)
    if asked.ok:
        return Finding("cluster", f"{address}: {asked.text}")
    reason = asked.text.partition("ConfigError: ")[2] or f"{address}: {asked.text}; {joining.REMEDY}"
    return _finding_of("cluster", ConfigError(reason))


def _finding_of(what: str, error: ConfigError) -> Finding:
    """Of a message "field: value; remedy"."""
    problem, _, remedy = str(error).removeprefix(f"{what}: ").partition("; ")
    return Finding(what, problem, remedy or "mend it")


def check_model(config: Config) -> Finding:
    """That the folder's weights are whole, transformers knows it, and vLLM serves its architecture. Loads no
    weights."""
    path = config.model.path
    if path.startswith("testbed:"):
        return Finding("model", f"{path}: made by the run itself")
    try:
        check_policy(config)
        base = saved.base_of(Path(path))
        words = saved.tokenizer_folder(Path(path))
    except ConfigError as error:
        problem, _, remedy = str(error).partition("; ")
        return Finding("model", problem, remedy or "mend model.path")
    code = (
        "from transformers import AutoConfig, AutoTokenizer; from vllm import ModelRegistry\n"
        f"c = AutoConfig.from_pretrained({str(base)!r}); AutoTokenizer.from_pretrained({str(words)!r})\n"
        "a = c.architectures[0]; assert a in ModelRegistry.get_supported_archs(), f'vLLM does not serve "
        "{a}'; print(a)"
    )
    asked = _ask_python(code, IMPORT_LIMIT_S)
    remedy = "" if asked.ok else "choose a model that transformers and vLLM both know"
    return Finding("model", f"{path}: {asked.text}", remedy)


@dataclass(frozen=True)
class ProbeAnswer:
    ok: bool
    text: str
    """Last line of what it said."""


def _ask_python(code: str, limit_s: float) -> ProbeAnswer:
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return ProbeAnswer(False, f"no answer within {limit_s:g} s")
    ok = done.returncode == 0
    said = done.stdout if ok else done.stderr
    lines = (said or "").strip().splitlines() or [""]
    return ProbeAnswer(ok, lines[-1][:200])
