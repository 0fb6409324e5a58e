"""What a wheel holds, and what an installed frpo does in an empty folder: recipes by name, `frpo init`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from setuptools import Distribution

from frpo.config import ConfigError
from frpo.config.service import ServiceConfig
from frpo.package_commands import NEXT, TEMPLATES, Kind
from frpo.preflight import check_rewards
from frpo.recipe import SHIPPED, dump_config, find_recipe, load_recipe, read_section
from frpo.rewards.loading import load_function
from tests.support.command_line import CommandLine

ROOT = Path(__file__).parents[2]
NAMES = ["audit_testbed", "paper_math_qwen", "paper_safety_mistral", "paper_safety_qwen", "testbed"]


# ---- the wheel


def list_files() -> set[str]:
    """Every file of the package, and every module behind its links: a new kind of file has to be named in
    pyproject.toml. What draws the Grafana board is no module."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "frpo").rglob("*") if path.is_file()}
    links = (ROOT / "frpo" / "actors", ROOT / "frpo" / "deploy")
    modules = chain.from_iterable(link.rglob("*.py") for link in links)
    behind = {path.relative_to(ROOT).as_posix() for path in modules}
    return {name for name in own | behind if "__pycache__" not in name} - {"frpo/deploy/grafana/board.py"}


def test_a_wheel_is_made_of_the_package_and_the_files_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the build backend reads pyproject.toml, without building."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.build_lib = "lib"
    build.ensure_finalized()
    names = {name.removeprefix("lib/") for name in build.get_outputs(include_bytecode=False)}
    assert names == list_files()
    assert {
        "frpo/actors/transport/group.py",
        "frpo/deploy/service.py",
        "frpo/py.typed",
        "frpo/recipes/testbed.yaml",
        "frpo/report/page.html.j2",
        "frpo/templates/data/prompts.jsonl",
        "frpo/templates/rewards/rewards.yaml",
    } <= names


def copy_repository(target: Path) -> Path:
    """What a wheel is built from, the links as links."""
    for name in ("frpo", "actors", "deploy", "recipes"):
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def build_in(folder: Path, kind: str) -> Path:
    code = f"from setuptools import build_meta as b; print('MADE', b.build_{kind}('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dist" / done.stdout.split("MADE ")[-1].strip()


def checksums(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as file:
        return {entry.filename: entry.CRC for entry in file.infolist()}


@pytest.mark.long
def test_a_wheel_of_the_repository_is_that_of_its_sdist_and_works_alone(tmp_path: Path) -> None:
    repository = copy_repository(tmp_path / "repository")
    with tarfile.open(build_in(repository, "sdist")) as archive:
        assert [entry.name for entry in archive if not (entry.isfile() or entry.isdir())] == []  # no links
        archive.extractall(tmp_path, filter="data")
    wheel = build_in(repository, "wheel")
    unpacked = next(tmp_path.glob("frpo-*"))
    assert checksums(wheel) == checksums(build_in(unpacked, "wheel"))
    names = checksums(wheel)
    assert {name.split("/")[0] for name in names} == {"frpo", f"{unpacked.name}.dist-info"}
    assert {name for name in names if name.startswith("frpo/")} == list_files()

    installed, empty = tmp_path / "installed", tmp_path / "empty"
    shutil.unpack_archive(wheel, installed, "zip")
    empty.mkdir()
    env = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"}
    shown = ""
    for words in (
        ["-c", "import frpo.actors.transport as a, frpo.deploy as d; print(a.__file__, d.__file__)"],
        ["-m", "frpo", "init"],
        ["-m", "frpo", "plan", "recipe.yaml"],
        ["-m", "frpo", "plan", "testbed"],
    ):
        done = subprocess.run(
            [sys.executable, *words], cwd=empty, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (words, done.stdout[-500:], done.stderr[-1000:])
        shown += done.stdout
    assert (
        f"{installed}/frpo/actors/transport/__init__.py {installed}/frpo/deploy/__init__.py\n"
        "Wrote prompts.jsonl, recipe.yaml, rewards.py\n"
    ) in shown
    assert shown.count("Nothing is missing.") == 2


@pytest.mark.long
def test_folders_of_a_user_never_stand_for_ours(tmp_path: Path) -> None:
    for folder, module in (("actors", "rollout"), ("deploy", "service"), ("recipes", "testbed")):
        (tmp_path / folder).mkdir()
        for name in ("__init__", module):
            (tmp_path / folder / f"{name}.py").write_text("raise SystemExit('the user\\'s own')\n")
    code = (
        "import sys, frpo.actors.rollout as a, frpo.deploy.service as d\n"
        "print(a.__file__, d.__file__, sorted({'actors', 'deploy', 'recipes'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{ROOT}/frpo/actors/rollout.py {ROOT}/frpo/deploy/service.py []\n"


def test_the_versions_are_those_of_the_installed(frpo: CommandLine) -> None:
    done = frpo("--version")
    assert done.code == 0
    versions = dict(line.split(" ") for line in done.out.splitlines())
    assert list(versions)[:3] == ["frpo", "torch", "ray"]
    assert versions["ray"] == "2.60.0"


# ---- recipes by name


def test_a_name_is_a_recipe_of_ours_unless_a_file_here_bears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("testbed")).name == "testbed"
    Path("testbed").mkdir()  # a folder is no recipe
    assert find_recipe(Path("testbed")) == SHIPPED / "testbed.yaml"
    Path("testbed").rmdir()
    Path("testbed").write_text("name: own")
    assert find_recipe(Path("testbed")) == Path("testbed")


def test_every_recipe_that_comes_along_is_the_repositorys_and_needs_no_other_file_of_it() -> None:
    assert sorted(path.stem for path in SHIPPED.iterdir()) == NAMES
    for name in NAMES:
        assert (SHIPPED / f"{name}.yaml").resolve() == ROOT / "recipes" / f"{name}.yaml"
        text = dump_config(load_recipe(Path(name)))
        assert [place for place in ("../", "recipes/", "examples/", "runs/") if place in text] == []


@pytest.mark.parametrize(
    "command",
    [("run",), ("sweep",), ("chaos",), ("plan",), ("config",), ("doctor",), ("audit", "--recipe")],
    ids=lambda words: words[0],
)
def test_every_command_that_takes_a_recipe_takes_its_name(
    command: tuple[str, ...], frpo: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert frpo.refuses(*command, "tesbed") == (
        "recipe tesbed: No such file or directory; give the path of a YAML file, or the name of one that "
        f"comes with frpo: {', '.join(NAMES)}\n"
    )
    assert "seed: Input should be a valid integer" in frpo.refuses(*command, "testbed", "--set", "seed=x")


# ---- frpo init


@pytest.fixture
def folder(frpo: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty one, in which the command line stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [Kind.data, Kind.testbed])
def test_what_init_writes_plans_as_it_stands(kind: Kind, folder: Path, frpo: CommandLine) -> None:
    said = frpo("init", kind).out
    written = sorted(path.name for path in folder.iterdir())
    assert said.splitlines() == [
        f"Wrote {', '.join(written)}",
        "Next:",
        *(f"  {line}" for line in NEXT[kind]),
    ]
    planned = frpo(*NEXT[kind][0].split()[1:])
    assert (planned.code, "Nothing is missing." in planned.out) == (0, True), planned


def test_the_service_that_init_writes_is_valid(folder: Path, frpo: CommandLine) -> None:
    assert "Wrote served/rewards.yaml\nNext, in served:\n  frpo serve rewards.yaml\n" in (
        frpo("init", "rewards", "served").out
    )
    config = read_section(folder / "served" / "rewards.yaml", (), ServiceConfig)
    check_rewards(config.rewards)
    assert (config.url, [reward.name for reward in config.rewards]) == (
        "http://127.0.0.1:8000",
        ["refusal", "length"],
    )


def test_the_rewards_that_init_writes_score_the_rows_beside_them() -> None:
    file = TEMPLATES / "data" / "rewards.py"
    refuses, is_right = (load_function(f"{file}:{name}") for name in ("refuses", "is_right"))
    texts = ["i must refuse this", "use a saw on the car"]
    assert refuses(prompts=["", ""], completions=texts, task=["harmful"] * 2) == [1.0, 0.0]
    assert is_right(prompts=[""] * 3, completions=[" five", "six", "a"], answer=["five", "five", None]) == [
        1.0,
        0.0,
        None,
    ]


def test_init_overwrites_nothing(folder: Path, frpo: CommandLine) -> None:
    (folder / "rewards.py").write_text("mine")
    assert frpo.refuses("init") == (
        "init: already there: rewards.py; nothing is overwritten, so give another folder\n"
    )
    assert [path.name for path in folder.iterdir()] == ["rewards.py"]
    assert frpo.refuses("init", "data", "rewards.py/below") == (
        "init: rewards.py/below: Not a directory; give a folder that can be written\n"
    )
    assert "'own' is not one of 'data', 'rewards', 'testbed'" in frpo.refuses("init", "own")
    assert (folder / "rewards.py").read_text() == "mine"


def test_every_section_of_a_template_is_explained() -> None:
    recipes = sorted(path.relative_to(TEMPLATES) for path in TEMPLATES.glob("*/*.yaml"))
    assert list(map(str, recipes)) == ["data/recipe.yaml", "rewards/rewards.yaml", "testbed/testbed.yaml"]
    for recipe in recipes:
        sections = (TEMPLATES / recipe).read_text().split("\n\n")
        assert [section for section in sections if "#" not in section] == [], recipe


def test_every_folder_of_templates_is_a_kind() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == set(Kind) == set(NEXT)


def test_a_path_that_cannot_be_looked_at_is_told_by_whoever_reads_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        load_recipe(tmp_path / "file" / "recipe.yaml")
