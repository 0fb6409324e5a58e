"""Hub names become folders once; nothing is downloaded here."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from frpo import hub, models
from frpo.config import Config, ConfigError
from frpo.recipe import load_recipe
from frpo.rundir import write_description
from tests.support import hubs

ROOT = Path(__file__).parents[2]
TESTBED = ROOT / "recipes" / "testbed.yaml"
EMPTY = len(b"{}").to_bytes(8, "little") + b"{}"
"""A safetensors file of no tensor."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text('{"head_dim": 64}')
    (folder / "model.safetensors").write_bytes(EMPTY)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and no way out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_name_is_its_snapshot_in_the_cache(cache: Path, model: Path) -> None:
    snapshot = hubs.cache(cache, "org/Name-2.5_B", model)
    assert hub.local_folder("org/Name-2.5_B") == snapshot
    assert hub.local_folder("org/Name-2.5_B/") == snapshot
    assert hub.local_folder(f"org/Name-2.5_B@{snapshot.name}") == snapshot


def test_a_folder_wins_over_the_hub_and_home_is_expanded(
    cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hubs.cache(cache, "org/name", model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.local_folder("org/name") == Path("org/name")
    assert hub.local_folder("~/saved") == model


@pytest.mark.parametrize(
    "given", ["/a/b", "./a/b", "../a", "a", "a/b/c", "testbed:model", "模型/模型", "a/b@", "-a/b"]
)
def test_paths_are_no_names(given: str) -> None:
    assert not hub.is_name(given)
    assert hub.local_folder(given) == Path(given)


def test_a_revision_is_its_own_snapshot(cache: Path, model: Path) -> None:
    main = hubs.cache(cache, "org/name", model)
    (model / "config.json").write_text("{}")
    old = hubs.cache(cache, "org/name", model, ref="v1")
    assert main != old
    assert (hub.local_folder("org/name"), hub.local_folder("org/name@v1")) == (main, old)


@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "tokenizer.json", "model-00002-of-00002.safetensors"]
)
def test_a_cache_that_holds_a_part_does_not_count(missing: str, cache: Path, model: Path) -> None:
    if missing.startswith("model-"):
        (model / "model.safetensors.index.json").write_text(
            f'{{"weight_map": {{"a": "model.safetensors", "b": "{missing}"}}}}'
        )
        (model / missing).write_bytes(EMPTY)
    hubs.cache(cache, "org/name", model, leave_out=(missing,))
    with pytest.raises(
        hub.Offline,
        match=r"^model\.path: org/name is neither a folder here nor whole in the cache "
        r".*HF_HUB_OFFLINE .* is set; give",
    ):
        hub.local_folder("org/name")


def test_links_to_pruned_blobs_do_not_count(cache: Path, model: Path) -> None:
    snapshot = hubs.cache(cache, "org/name", model)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(hub.Offline):
        hub.local_folder("org/name")


def test_without_a_ref_the_commit_is_named(cache: Path, model: Path) -> None:
    snapshot = hubs.cache(cache, "org/name", model, ref=None)
    with pytest.raises(hub.Offline):
        hub.local_folder("org/name")
    assert hub.local_folder(f"org/name@{snapshot.name}") == snapshot


def test_what_is_not_cached_is_told_and_not_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        hub.NotCached, match=r"^model\.path: org/name is not in the cache; frpo run downloads it$"
    ):
        hub.local_folder("org/name", download=False)
    assert not cache.exists()


def answer(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind(
        "no",
        response=httpx2.Response(
            status, request=httpx2.Request("GET", "https://huggingface.co/api/models/org/name")
        ),
    )


REFUSED: list[tuple[Exception, str]] = [
    (answer(errors.GatedRepoError, 403),
     r"org/name is gated; accept its terms at https://huggingface\.co/org/name, and set HF_TOKEN"),
    (answer(errors.RepositoryNotFoundError, 401),
     "org/name is neither a folder here nor a model that the hub shows; mend the name, or set HF_TOKEN"),
    (answer(errors.RevisionNotFoundError, 404), "org/name@v9 has no revision v9; name a branch"),
    (answer(errors.HfHubHTTPError, 503),
     r"org/name was not given by the hub \(503\); set HF_TOKEN if it asks for one, or try again later"),
    (errors.LocalEntryNotFoundError("down"),
     "org/name is neither a folder here nor in the cache, and the hub does not answer"),
    (OSError(errno.ENOSPC, "No space left on device"),
     r"was not written to .*cache \(No space left on device\); make room, or set HF_HUB_CACHE"),
    (PermissionError(errno.EACCES, "Permission denied"),
     r"was not written to .*cache \(Permission denied\); look at the cache's folder"),
    (RuntimeError("Xet:\n  broken pipe"),
     r"org/name was not downloaded \(RuntimeError: Xet: broken pipe\); look at the network"),
    (httpx2.ProxyError("407"), r"org/name was not downloaded \(ProxyError: 407\); look at the network"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message"), REFUSED, ids=[type(e).__name__ for e, _ in REFUSED])
def test_what_the_hub_refuses_is_one_line(
    error: Exception, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", online(lambda: fail(error)))
    with pytest.raises(ConfigError, match=r"^rewards\.0\.path: .*" + message) as raised:
        hub.local_folder("org/name@v9" if "v9" in message else "org/name", "rewards.0.path")
    assert "\n" not in str(raised.value)


def fail(error: Exception) -> Path:
    raise error


def online(download: Callable[[], Path]) -> Callable[..., str]:
    """snapshot_download over an empty cache."""

    def snapshot_download(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        return str(download())

    return snapshot_download


def test_pickles_alone_are_refused(cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", online(lambda: model))
    with pytest.raises(
        ConfigError, match=r"org/name lacks config\.json, \.safetensors files or a tokenizer; choose another"
    ):
        hub.local_folder("org/name")


def configuration(*sets: str) -> Config:
    return load_recipe(
        TESTBED, ("model.path=org/policy", "rewards=[{kind: model, name: help, path: org/judge}]", *sets)
    )


def test_the_configuration_holds_folders_and_its_file_the_names(
    cache: Path, model: Path, tmp_path: Path
) -> None:
    policy, judge = hubs.cache(cache, "org/policy", model), hubs.cache(cache, "org/judge", model)
    given = configuration()
    resolved = models.resolve_models(given)
    assert resolved.model.path == str(policy)
    assert resolved.rewards[0].path == str(judge)  # type: ignore[union-attr]
    (tmp_path / "run").mkdir()
    write_description(tmp_path / "run", resolved)
    kept = load_recipe(tmp_path / "run" / "config.yaml")
    assert kept.model.path == f"org/policy@{policy.name}"
    assert models.resolve_models(kept) == resolved


def test_paths_stay_as_they_are_written(cache: Path) -> None:
    for path in ("https://huggingface.co/org/name", "/nowhere//x/", "testbed:model"):
        assert (
            models.resolve_models(
                configuration(f"model.path={path}", "rewards=[{kind: function, name: f, function: 'm:f'}]")
            ).model.path
            == path
        )
    with pytest.raises(ConfigError, match=r"path: this is no path"):
        configuration("model.path=''")


def test_what_is_cached_is_used_by_a_plan_and_the_rest_told(cache: Path, model: Path) -> None:
    policy = hubs.cache(cache, "org/policy", model)
    cached, missing = models.find_cached_models(configuration())
    assert cached.model.path == str(policy)
    assert cached.rewards == configuration().rewards
    assert [str(m).partition(";")[0][:60] for m in missing] == [
        "rewards.0.path: org/judge is neither a folder here nor whole i"[:60]
    ]


def test_a_snapshot_of_another_nodes_cache_is_found_in_this_ones(
    cache: Path, model: Path, tmp_path: Path
) -> None:
    snapshot = hubs.cache(cache, "org/name", model)
    elsewhere = f"/home/other/.cache/huggingface/hub/models--org--name/snapshots/{snapshot.name}"
    assert hub.on_this_node(elsewhere) == snapshot
    assert hub.on_this_node(model) == model
    shutil.rmtree(cache)
    with pytest.raises(
        FileNotFoundError,
        match=rf"node {os.uname().nodename}: model: org/name@{snapshot.name} is neither .* all nodes share",
    ):
        hub.on_this_node(elsewhere)
    with pytest.raises(
        FileNotFoundError, match=r"node .*: no folder /nowhere/model; put it on a disk that all nodes share"
    ):
        hub.on_this_node("/nowhere/model")


@pytest.mark.long
@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"])
def test_plan_takes_the_model_from_the_cache_that_a_variable_names(
    variable: str, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "hub"
    hubs.cache(folder, "org/policy", model)
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_HUB_OFFLINE": "1",
        variable: str(folder.parent if variable == "HF_HOME" else folder),
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "frpo", "plan", str(TESTBED), "--set", "model.path=org/policy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing is missing" in done.stdout
