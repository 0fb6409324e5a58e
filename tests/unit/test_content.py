"""What a recipe names counts by what it holds, wherever it lies; files are read once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from frpo import content
from frpo.config.section import Content
from frpo.content import Digests, local_imports

CODE, DATA, MODEL, TASKS = Content("code"), Content("data"), Content("model"), Content("tasks")


def of(what: Content, value: object) -> str:
    return Digests(Path("nowhere")).of(what, str(value) if isinstance(value, Path) else value)


def rewards(folder: Path) -> Path:
    """A reward file that imports a neighbour, a package with a relative import, and by name; one file is
    imported by nobody."""
    (folder / "pack" / "deep").mkdir(parents=True)
    (folder / "reward.py").write_text(
        "import json\nimport near\nfrom pack import inner\n\ndef f(prompts, completions):\n    import late\n"
    )
    (folder / "near.py").write_text("import importlib\nimportlib.import_module('named')\n")
    (folder / "named.py").write_text("X = 1\n")
    (folder / "late.py").write_text("import near  # in a circle: near is known\n")
    (folder / "pack" / "__init__.py").write_text("")
    (folder / "pack" / "inner.py").write_text("from .deep.core import X\nfrom . import other\n")
    (folder / "pack" / "other.py").write_text("")
    (folder / "pack" / "deep" / "core.py").write_text("X = 1\n")
    (folder / "stranger.py").write_text("X = 1\n")
    return folder / "reward.py"


def test_reward_code_is_found_through_every_kind_of_import(tmp_path: Path) -> None:
    imported = {str(p.relative_to(tmp_path)) for p in local_imports(rewards(tmp_path), tmp_path)}
    inside = {"pack/__init__.py", "pack/inner.py", "pack/other.py", "pack/deep/core.py"}
    assert imported == {"reward.py", "near.py", "named.py", "late.py"} | inside


@pytest.mark.parametrize(
    "name",
    ["reward.py", "near.py", "named.py", "late.py", "pack/inner.py", "pack/deep/core.py", "stranger.py"],
)
def test_reward_code_counts_with_what_it_imports(name: str, tmp_path: Path) -> None:
    spec = f"{rewards(tmp_path)}:f"
    before = of(CODE, spec)
    file = tmp_path / name
    file.write_text(file.read_text().replace("1", "2") + "Y = 3\n")
    assert (of(CODE, spec) == before) == (name == "stranger.py")


def test_another_function_is_another_reward_and_another_name_of_its_file_is_not(tmp_path: Path) -> None:
    file = rewards(tmp_path)
    before = of(CODE, f"{file}:f")
    assert of(CODE, f"{file}:g") != before
    file.rename(tmp_path / "renamed.py")
    assert of(CODE, f"{tmp_path / 'renamed.py'}:f") == before


def test_a_module_counts_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_a.py").write_text("import mine_b\n")
    (tmp_path / "mine_b.py").write_text("X = 1\n")
    before = of(CODE, "mine_a:f")
    (tmp_path / "mine_b.py").write_text("X = 2\n")
    assert of(CODE, "mine_a:f") != before


def test_an_installed_module_counts_by_its_file_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "bought"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(package.parent)
    (package / "__init__.py").write_text("")
    (package / "rewards.py").write_text("X = 1\n")
    digests = []
    for version in ("1.0", "1.1"):
        monkeypatch.setattr(content, "_version_of", lambda name, version=version: version)
        digests.append(of(CODE, "bought.rewards:f"))
    (package / "rewards.py").write_text("X = 2\n")
    assert len({*digests, of(CODE, "bought.rewards:f")}) == 3


def test_our_own_rewards_do_not_depend_on_the_rest_of_frpo() -> None:
    root = content.OURS.parent
    imported = {
        str(p.relative_to(root)) for p in local_imports(content.OURS / "rewards" / "__init__.py", root)
    }
    assert "frpo/rewards/gym.py" in imported
    assert all(name.startswith("frpo/rewards/") for name in imported)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_model_counts_by_configuration_tokenizer_and_weights(file: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"):
        (tmp_path / "m" / name).write_text(name)
    before = of(MODEL, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("another word")
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    assert of(MODEL, tmp_path / "elsewhere") == before
    (tmp_path / "elsewhere" / file).write_text("changed")
    assert of(MODEL, tmp_path / "elsewhere") != before


def test_an_adapter_counts_with_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = of(MODEL, adapter)
    (base / "model.safetensors").write_text("other weights")
    assert of(MODEL, adapter) != before


@pytest.mark.parametrize("change", ["rows", "folder", "split"])
def test_data_count_by_their_bytes(change: str, tmp_path: Path) -> None:
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "data-0.arrow").write_text("rows")
    (tmp_path / "saved" / "train" / "cache-1234.arrow").write_text("left by a library")
    (tmp_path / "rows.jsonl").write_text("rows")
    file, folder = of(DATA, tmp_path / "rows.jsonl"), of(DATA, tmp_path / "saved")
    (tmp_path / "saved" / "train" / "cache-1234.arrow").unlink()
    (tmp_path / "saved").rename(tmp_path / "moved")
    (tmp_path / "rows.jsonl").rename(tmp_path / "renamed.jsonl")
    assert (of(DATA, tmp_path / "renamed.jsonl"), of(DATA, tmp_path / "moved")) == (file, folder)
    if change == "rows":
        (tmp_path / "renamed.jsonl").write_text("Rows")
    elif change == "folder":
        (tmp_path / "moved" / "train" / "data-0.arrow").write_text("Rows")
    else:
        (tmp_path / "moved" / "train").rename(tmp_path / "moved" / "test")
    assert (of(DATA, tmp_path / "renamed.jsonl"), of(DATA, tmp_path / "moved")) != (file, folder)


def adapter_on(folder: Path, base: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": base})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    return folder


def test_an_adapter_counts_with_its_base_wherever_that_lies(tmp_path: Path) -> None:
    for place in (tmp_path / "base", tmp_path / "adapter" / "inside"):
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(b"weights")
    before = of(MODEL, adapter_on(tmp_path / "adapter", str(tmp_path / "base")))
    (tmp_path / "base").rename(tmp_path / "moved")
    assert of(MODEL, adapter_on(tmp_path / "adapter", str(tmp_path / "moved"))) == before
    assert of(MODEL, adapter_on(tmp_path / "adapter", "inside")) == before
    (tmp_path / "adapter" / "inside" / "model.safetensors").write_bytes(b"others")
    assert of(MODEL, tmp_path / "adapter") != before


def test_a_file_of_a_folder_counts_though_its_name_begins_as_a_cache(tmp_path: Path) -> None:
    (tmp_path / "cache-rows.jsonl").write_text("1")
    before = of(DATA, tmp_path)
    (tmp_path / "cache-rows.jsonl").write_text("2")
    assert of(DATA, tmp_path) != before


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- 1",
        "",
        "dataset_kwargs: 3",
        "dataset_kwargs: {data_files: [3, null]}",
        "a: &a [*a]",
        "include: t.yaml",
    ],
)
def test_a_task_file_of_any_content_counts_by_its_bytes(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    before = of(TASKS, [str(tmp_path / "t.yaml")])
    (tmp_path / "t.yaml").write_text(text + " ")
    assert of(TASKS, [str(tmp_path / "t.yaml")]) != before


def test_task_files_may_include_one_another(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml")
    (tmp_path / "b.yaml").write_text("include: a.yaml")
    assert len(of(TASKS, [str(tmp_path / "a.yaml")])) == 64


@pytest.mark.parametrize("text", ["null", "5", "[1]", '{"a":'])
def test_torn_digests_are_made_again(text: str, tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_text(text)
    assert Digests(tmp_path).known == {}


def test_what_cannot_be_read_counts_by_its_name() -> None:
    assert of(DATA, "organisation/rows") == "organisation/rows"
    assert of(MODEL, "organisation/model") == "organisation/model"
    assert of(CODE, "no_such_module:f") == "no_such_module:f"
    assert of(DATA, "testbed:base") != of(DATA, "testbed:base?refusal=0.9")


TASK = """
task: a
include: common.yaml
dataset_kwargs: {{data_files: {{test: {rows}}}}}
process_docs: !function helper.process
"""


@pytest.mark.parametrize("name", ["task.yaml", "common.yaml", "rows.jsonl", "helper.py", "deeper.py"])
def test_a_task_file_counts_with_its_data_and_code(name: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "common.yaml").write_text("metric_list: []\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "helper.py").write_text("import deeper\n")
    (tmp_path / "deeper.py").write_text("X = 1\n")
    tasks = [str(tmp_path / "task.yaml"), "gsm8k"]
    before = of(TASKS, tasks)
    assert of(TASKS, tasks[:1]) != before
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n# more")
    assert of(TASKS, tasks) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(b"longer than before"),
        lambda file: (file.write_bytes(b"after."), os.utime(file, ns=(1, 1))),
        lambda file: ((file.parent / "new").write_bytes(b"after."), (file.parent / "new").replace(file)),
    ],
)
def test_a_file_is_read_again_when_it_has_changed_and_only_then(
    change: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = tmp_path / "weights", []
    file.write_bytes(b"before")
    os.utime(file, ns=(1, 1))
    real = content.sha256_of
    monkeypatch.setattr(content, "sha256_of", lambda path: read.append(path) or real(path))
    digests = Digests(tmp_path)
    first = digests.file(file)
    digests.save()
    content._sha256_once.cache_clear()
    assert Digests(tmp_path).file(file) == first
    assert len(read) == 1
    change(file)
    assert Digests(tmp_path).file(file) != first
