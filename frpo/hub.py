"""Hub names become folders: in the cache that this node's Hugging Face libraries use, or downloaded into it.

A folder that lies in the cache of another node is found again here by its name and commit.
"""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from frpo.config import ConfigError, Missing
from frpo.disk import is_disk_full

HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
SNAPSHOT = re.compile(
    r"/models--(?P<organisation>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$"
)
"""Of the cache's layout, https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md"]
"""Weights, tokenizers, and the card, which tells the licence; never a pickle."""
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
        if cached := _find_in_cache(given):
            return cached
        if is_offline_mode():
            raise Offline(
                f"{field}: {given} is neither a folder here nor whole in the cache {_cache_folder()}, and "
                "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set; give a folder, or unset it",
                given,
            )
        if not download:
            raise NotCached(f"{field}: {given} is not in the cache; frpo run downloads it", given)
        return _download_model(given, field)
    except HFValidationError as error:
        raise ConfigError(
            f"{field}: {given} is neither a folder here nor a hub name ({error}); give organisation/name or "
            "a folder"
        ) from None


def _name_and_revision(given: str) -> tuple[str, str | None]:
    match = HUB_NAME.fullmatch(given.rstrip("/"))
    assert match is not None, given
    return match["name"], match["revision"]


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _find_in_cache(given: str) -> Path | None:
    """The snapshot of the name in the cache, where nothing of it is missing."""
    try:
        folder = _fetch_snapshot(given, local_files_only=True)
    except OSError:  # LocalEntryNotFoundError is one
        return None
    return folder if _is_whole(folder) else None


def _fetch_snapshot(given: str, **how: Any) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = _name_and_revision(given)
    folder = snapshot_download(
        name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED, **how
    )
    return Path(folder)


def _is_whole(folder: Path) -> bool:
    """Whether weights, configuration and tokenizer are there: a tool may have fetched a few files alone, and
    links may have lost what they link to."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    if not any(name.endswith(".safetensors") for name in names) or not _shards_of(folder) <= names:
        return False
    if "adapter_config.json" in names:
        return True
    return "config.json" in names and any(map(_is_of_tokenizer, names))


def _shards_of(folder: Path) -> set[str]:
    """Names of the files that the index of the weights lists; none without an index, or with one that is
    torn, of which preflight says so."""
    index = folder / "model.safetensors.index.json"
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError):
        return set()


def _is_of_tokenizer(name: str) -> bool:
    return name.startswith(("tokenizer", "vocab")) or name.endswith((".model", ".tiktoken"))


def _download_model(given: str, field: str) -> Path:
    print(f"{given} is not in the cache; downloading it to {_cache_folder()}", flush=True)
    try:
        folder = _fetch_snapshot(given, etag_timeout=ANSWER_S)
    except Exception as error:  # the hub's, the disk's, and those of the transport, which has its own kinds
        reason = _why_not_downloaded(error, given)
        raise ConfigError(f"{field}: {given} {' '.join(reason.split())}") from None
    if not _is_whole(folder):
        raise ConfigError(
            f"{field}: {given} lacks config.json, .safetensors files or a tokenizer; choose another, or "
            "save it with them"
        )
    return folder


def _why_not_downloaded(error: Exception, given: str) -> str:
    """What to say of a model after its name, with the remedy."""
    from huggingface_hub import errors

    name, revision = _name_and_revision(given)
    page = f"https://huggingface.co/{name}"
    if isinstance(error, errors.GatedRepoError):  # before the kind of error that it is one of
        return f"is gated; accept its terms at {page}, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        shown = "is neither a folder here nor a model that the hub shows"
        return f"{shown}; mend the name, or set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision}; name a branch, a tag or a commit of {page}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        known = "is neither a folder here nor in the cache, and the hub does not answer"
        return f"{known}; give a folder, or look at the network"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"was not given by the hub ({status}); set HF_TOKEN if it asks for one, or try again later"
    if isinstance(error, OSError):
        remedy = "look at the cache's folder, or set HF_HUB_CACHE to another"
        if is_disk_full(error):
            remedy = "make room, or set HF_HUB_CACHE to another disk"
        return f"was not written to {_cache_folder()} ({error.strerror or error}); {remedy}"
    remedy = "look at the network, what is there is kept for the next try"
    return f"was not downloaded ({type(error).__name__}: {error}); {remedy}"


# ---- other nodes


def name_of(path: str) -> str | None:
    """organisation/name@commit of a folder in a cache; None of any other."""
    match = SNAPSHOT.search(path)
    return f"{match['organisation']}/{match['name']}@{match['commit']}" if match else None


def on_this_node(path: str | Path) -> Path:
    """A model's folder as a worker finds it: the same path, else its name and commit in this node's cache,
    else downloaded into that.

    Raises FileNotFoundError naming the node and what to do. The caller's own time limit holds for a download.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = name_of(str(path))
    remedy = "put it on a disk that all nodes share"
    if name is None:
        raise FileNotFoundError(f"node {platform.node()}: no folder {folder}; {remedy}")
    try:
        return local_folder(name, "model")
    except ConfigError as error:
        raise FileNotFoundError(f"node {platform.node()}: {error}; or {remedy} (HF_HUB_CACHE)") from None
