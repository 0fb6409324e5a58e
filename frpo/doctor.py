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

IMPORT_LIMIT_S, CLUSTER_LIMIT_S = 180, 60
LEAST_DISK_GIB, LEAST_TMP_GIB, LEAST_SHM_GIB, LEAST_MEMORY_GIB = 5.0, 3.0, 1.0, 6.0
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
    config, uncached = models.cached(config) if config else (None, [])
    yield python()
    yield from versions()
    yield accelerators()
    yield from space(config)
    yield token()
    yield from engines()
    yield cluster((config.cluster.address if config else None) or os.environ.get("RAY_ADDRESS"))
    if config:
        for error in uncached:
            yield (
                Finding("model", *str(error).split("; ", 1))
                if isinstance(error, hub.Offline)
                else Finding("model", str(error))
            )
        if not hub.is_name(config.model.path):
            yield model(config)


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    right = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding("python", version, "" if right else "make the environment with Python 3.11 or 3.12")


def versions() -> Iterator[Finding]:
    """Installed packages against what frpo asks for, the engine's extra of this machine included."""
    extra = "gpu" if resources.num_gpus() else "cpu"
    asked = [Requirement(text) for text in metadata.requires("frpo") or []]
    mine = [r for r in asked if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", extra))]
    strictest = {
        r.name: r for r in sorted(mine, key=lambda r: len(r.specifier))
    }  # a package can stand in several extras
    for requirement in strictest.values():
        name = f"{requirement.name} {requirement.specifier}".strip()
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", f"deploy/install.sh, or pip install '{name}'")
            continue
        fits = requirement.specifier.contains(version.split("+")[0], prereleases=True)
        yield Finding(
            requirement.name, version, "" if fits else f"frpo was run with {name}: pip install '{name}'"
        )


def accelerators() -> Finding:
    count = resources.num_gpus()
    if not count:
        return Finding("accelerators", "no NVIDIA GPU: everything runs on the CPU")
    asked = _ask("import torch; print(torch.cuda.device_count())", IMPORT_LIMIT_S)
    if asked.ok and asked.text == str(count):
        return Finding("accelerators", f"{count} GPUs")
    return Finding(
        "accelerators",
        f"{count} GPUs, torch sees {asked.text}",
        "install a CUDA build of torch: FRPO_ACCELERATOR=gpu deploy/install.sh",
    )


def space(config: Config | None) -> Iterator[Finding]:
    folder = config.folder if config else Path("runs")
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    need = max(LEAST_DISK_GIB, resources.disk_bytes(config) / 2**30 if config else 0.0)
    yield _room("disk", parent, need, "choose another --run-dir, or make room")
    yield ray_folder()
    if (shared := Path("/dev/shm")).is_dir():
        need = max(LEAST_SHM_GIB, 0.5 + weight_bytes(config.model) / 2**30 if config else 0.0)
        yield _room(
            "shared memory",
            shared,
            need,
            "give the container more (docker run --shm-size): Ray's object store lies there",
        )
    import psutil

    memory = psutil.virtual_memory().available / 2**30
    yield Finding(
        "memory",
        f"{memory:.1f} GiB available",
        "" if memory >= LEAST_MEMORY_GIB else f"a run needs about {LEAST_MEMORY_GIB:g} GiB",
    )


def _room(what: str, folder: Path, need: float, remedy: str) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    return Finding(
        what,
        f"{free:.1f} GiB free in {folder}",
        "" if free >= need else f"{need:.1f} GiB are needed: {remedy}",
    )


def ray_folder() -> Finding:
    """Where a Ray that a run starts keeps its logs, its sockets and spilled objects."""
    try:
        folder = joining.temporary_folder()
    except ConfigError as error:
        return _finding("temporary folder", error)
    room = _room(
        "temporary folder", folder, LEAST_TMP_GIB, "make room: Ray keeps its logs and spilled objects there"
    )
    asked = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    if asked and not folder.is_relative_to(asked):
        return replace(room, found=f"{asked} is too long; Ray's sockets go to {folder}: {room.found}")
    return room


def token() -> Finding:
    """Of the Ray cluster; a run that starts its own Ray makes one for itself."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        return Finding(
            "token",
            "RAY_AUTH_MODE=disabled",
            "anybody who reaches the cluster's ports runs code there: set RAY_AUTH_MODE=token",
        )
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"]
    held = "RAY_AUTH_TOKEN" in os.environ or any(p and Path(p).expanduser().is_file() for p in places)
    if mode == "token" and "RAY_ADDRESS" in os.environ and not held:
        return Finding(
            "token",
            "RAY_AUTH_MODE=token without a token",
            "set RAY_AUTH_TOKEN to that of the head (ray get-auth-token there)",
        )
    return Finding("token", "held" if held else "none yet: a Ray that a run starts makes its own")


def engines() -> Iterator[Finding]:
    for what, module in ENGINES.items():
        asked = _ask(f"import {module}", IMPORT_LIMIT_S)
        yield Finding(
            f"import {what}",
            "works" if asked.ok else asked.text,
            "" if asked.ok else "deploy/install.sh installs what fits together",
        )


def cluster(address: str | None) -> Finding:
    if address is None:
        return Finding("cluster", "none named: a run starts Ray on this machine")
    try:
        joining.refuse_unreachable(address, "cluster")
    except ConfigError as error:
        return _finding("cluster", error)
    code = f"import ray; from frpo import joining; joining.connect({address!r}, 'cluster'); print(ray.cluster_resources())"
    asked = _ask(code, CLUSTER_LIMIT_S)
    if asked.ok:
        return Finding("cluster", f"{address}: {asked.text}")
    return _finding(
        "cluster",
        ConfigError(asked.text.partition("ConfigError: ")[2] or f"{address}: {asked.text}; {joining.REMEDY}"),
    )


def _finding(what: str, error: ConfigError) -> Finding:
    """Of a message "field: value; remedy"."""
    found, _, remedy = str(error).removeprefix(f"{what}: ").partition("; ")
    return Finding(what, found, remedy or "mend it")


def model(config: Config) -> Finding:
    """That the folder's weights are whole, transformers knows it, and vLLM serves its architecture. Loads no
    weights."""
    path = config.model.path
    if path.startswith("testbed:"):
        return Finding("model", f"{path}: made by the run itself")
    try:
        check_policy(config)
        base, words = saved.base(Path(path)), saved.tokenizer(Path(path))
    except ConfigError as error:
        return Finding(
            "model", str(error).partition("; ")[0], str(error).partition("; ")[2] or "mend model.path"
        )
    code = (
        "from transformers import AutoConfig, AutoTokenizer; from vllm import ModelRegistry\n"
        f"c = AutoConfig.from_pretrained({str(base)!r}); AutoTokenizer.from_pretrained({str(words)!r})\n"
        "a = c.architectures[0]; assert a in ModelRegistry.get_supported_archs(), f'vLLM does not serve "
        "{a}'; print(a)"
    )
    asked = _ask(code, IMPORT_LIMIT_S)
    return Finding(
        "model",
        f"{path}: {asked.text}",
        "" if asked.ok else "choose a model that transformers and vLLM both know",
    )


@dataclass(frozen=True)
class Answer:
    ok: bool
    text: str
    """Last line of what it said."""


def _ask(code: str, limit_s: float) -> Answer:
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Answer(False, f"no answer within {limit_s:g} s")
    lines = ((done.stdout if done.returncode == 0 else done.stderr) or "").strip().splitlines()
    return Answer(done.returncode == 0, lines[-1][:200] if lines else "")
