"""Hub names become folders: in the cache that this node's Hugging Face libraries use, or downloaded into it.

A folder that lies in the cache of another node is found again here by its name and commit.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from pathlib import Path

from frpo.config import ConfigError, Missing

HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
SNAPSHOT = re.compile(
    r"/models--(?P<organisation>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$"
)
"""Of the cache's layout, https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
"""Weights and tokenizers; never a pickle."""
UNWANTED = ["*/*", "consolidated*"]
"""Other formats' copies of the same weights."""
ANSWER_S = 5.0
"""How long the hub may take to answer what it has of a file."""


class NotCached(Missing):
    """A hub name whose model is not, or not wholly, in the cache: to be downloaded."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class Offline(NotCached):
    """Nor may it be downloaded."""


def is_name(given: str) -> bool:
    """Whether it names a model on the hub, organisation/name or organisation/name@revision: a folder of that
    name comes first."""
    return HUB_NAME.fullmatch(given.rstrip("/")) is not None and not os.path.exists(given.rstrip("/"))


def local_folder(given: str, field: str = "model.path", *, download: bool = True) -> Path:
    """The folder of a model: a path as it is, with ~ expanded, or the snapshot that a hub name stands for,
    the cache first.

    Raises NotCached where it would have to be downloaded and is not to be; ConfigError naming field, value
    and remedy where the hub does not give it.
    """
    if not is_name(given):
        return Path(given).expanduser()
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import HFValidationError

    try:
        if cached := _cached(given):
            return cached
        if is_offline_mode():
            raise Offline(
                f"{field}: {given} is neither a folder here nor whole in the cache {_cache()}, and "
                "HF_HUB_OFFLINE (or "
                f"TRANSFORMERS_OFFLINE) is set; give a folder, or unset it",
                given,
            )
        if not download:
            raise NotCached(f"{field}: {given} is not in the cache; frpo run downloads it", given)
        return _download(given, field)
    except HFValidationError as error:
        raise ConfigError(
            f"{field}: {given} is neither a folder here nor a hub name ({error}); give organisation/name or "
            "a folder"
        ) from None


def _parts(given: str) -> tuple[str, str | None]:
    found = HUB_NAME.fullmatch(given.rstrip("/"))
    assert found is not None, given
    return found["name"], found["revision"]


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _cached(given: str) -> Path | None:
    """The snapshot of the name in the cache, where nothing of it is missing."""
    from huggingface_hub import snapshot_download

    name, revision = _parts(given)
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
            )
        )
    except OSError:  # LocalEntryNotFoundError is one
        return None
    return folder if _whole(folder) else None


def _whole(folder: Path) -> bool:
    """Whether weights, configuration and tokenizer are there: a tool may have fetched a few files alone, and
    links may have lost what they link to."""
    try:
        shards = set(
            json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))[
                "weight_map"
            ].values()
        )
    except (OSError, ValueError, KeyError):  # no index; of one that is torn, preflight says so
        shards = set()
    names = {f.name for f in folder.iterdir() if f.is_file()}
    weights = shards <= names and any(name.endswith(".safetensors") for name in names)
    spoken = any(
        name.startswith(("tokenizer", "vocab")) or name.endswith((".model", ".tiktoken")) for name in names
    )
    return weights and ("adapter_config.json" in names or ("config.json" in names and spoken))


def _download(given: str, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = _parts(given)
    print(f"{given} is not in the cache; downloading it to {_cache()}", flush=True)
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                etag_timeout=ANSWER_S,
            )
        )
    except GatedRepoError:
        reason = f"is gated; accept its terms at https://huggingface.co/{name}, and set HF_TOKEN to a token of that account"
    except RepositoryNotFoundError:
        reason = "is neither a folder here nor a model that the hub shows; mend the name, or set HF_TOKEN if it is private"
    except RevisionNotFoundError:
        reason = (
            f"has no revision {revision}; name a branch, a tag or a commit of https://huggingface.co/{name}"
        )
    except LocalEntryNotFoundError:
        reason = "is neither a folder here nor in the cache, and the hub does not answer; give a folder, or look at the network"
    except HfHubHTTPError as error:
        reason = f"was not given by the hub ({error.response.status_code}); set HF_TOKEN if it asks for one, or try again later"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "make room, or set HF_HUB_CACHE to another disk"
            if full
            else "look at the cache's folder, or set HF_HUB_CACHE to another"
        )
        reason = f"was not written to {_cache()} ({error.strerror or error}); {remedy}"
    except Exception as error:  # of the transport, which has kinds of its own
        reason = f"was not downloaded ({type(error).__name__}: {error}); look at the network, what is there is kept for the next try"
    else:
        if not _whole(folder):
            raise ConfigError(
                f"{field}: {given} lacks config.json, .safetensors files or a tokenizer; choose another, or "
                "save it with them"
            )
        return folder
    raise ConfigError(f"{field}: {given} {' '.join(reason.split())}") from None


# ---- other nodes


def name_of(path: str) -> str | None:
    """organisation/name@commit of a folder in a cache; None of any other."""
    found = SNAPSHOT.search(path)
    return f"{found['organisation']}/{found['name']}@{found['commit']}" if found else None


def on_this_node(path: str | Path) -> Path:
    """A model's folder as a worker finds it: the same path, else its name and commit in this node's cache,
    else downloaded into that.

    Raises FileNotFoundError naming the node and what to do. The caller's own time limit holds for a download.
    """
    folder, name = Path(path), name_of(str(path))
    if folder.is_dir():
        return folder
    remedy = "put it on a disk that all nodes share"
    if name is None:
        raise FileNotFoundError(f"node {platform.node()}: no folder {folder}; {remedy}")
    try:
        return local_folder(name, "model")
    except ConfigError as error:
        raise FileNotFoundError(f"node {platform.node()}: {error}; or {remedy} (HF_HUB_CACHE)") from None
