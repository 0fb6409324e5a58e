"""Links of the pages lead somewhere, the configuration page has every field, and the site builds without a
warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from frpo import config, rewards
from frpo.config import Config
from frpo.config.service import ServiceConfig
from tests.support.pages import ROOT, load_hook

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def list_pages() -> list[Path]:
    """Every Markdown file of the repository that people read."""
    inside = (
        folder.rglob("*.md") for folder in map(ROOT.joinpath, ("docs", "deploy", "examples", ".github"))
    )
    return [*ROOT.glob("*.md"), *chain.from_iterable(inside)]


def anchors_of(page: Path) -> set[str]:
    """Of its headings: lower case, no marks, a hyphen for a blank."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    return dead


def test_no_link_of_a_page_is_dead() -> None:
    names = {page.relative_to(ROOT).as_posix() for page in list_pages()}
    assert names >= {"README.md", "CONTRIBUTING.md", "docs/extending.md", "deploy/README.md"}
    assert {name: dead for name in names if (dead := dead_links(ROOT / name))} == {}


def test_the_readme_is_short_and_its_first_screen_is_enough_to_decide() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 115
    screen = "\n".join(lines[:36])
    for words in ("For whom", "make demo", "What was found", "## How it compares", "| not here |"):
        assert words in screen
    assert "![" not in screen  # a picture takes the place of what is to be read


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A page\n\n## One thing, and another\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#one-thing-and-another) [b](there.md#two) [c](gone.md) ![d](gone.png) [e](#here)\n\n"
        "```\n[f](in-code.md)\n```\n\n# Here\n"
    )
    assert dead_links(page) == ["there.md#two", "gone.md", "gone.png"]


def test_a_list_stands_behind_an_empty_line() -> None:
    """Python-Markdown, which makes the site, reads it as text else."""
    item = re.compile(r"^([^\s#|>-][^\n]*)\n(?:- |\d+\. )", re.MULTILINE)
    wrong = {}
    for page in list_pages():
        text = FENCE.sub("", page.read_text())
        wrong[page.name] = [line for line in item.findall(text) if not re.match(r"- |\d+\. | ", line)]
    assert {name: lines for name, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize("form", ["bug", "feature", "question"])
def test_a_form_asks_for_what_a_maintainer_needs_first(form: str) -> None:
    asked = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    fields = {field["id"]: field for field in asked["body"]}
    assert fields.keys() >= {"recipe", "doctor"} | ({"lines"} if form != "feature" else set())
    required = [name for name, field in fields.items() if field.get("validations", {}).get("required")]
    assert (
        required
        == {
            "bug": ["what", "recipe", "lines", "doctor"],
            "feature": ["goal", "without"],
            "question": ["question"],
        }[form]
    )


def rows_of(page: str) -> dict[str, dict[str, list[str]]]:
    """Cells of each field, by section."""
    rows: dict[str, dict[str, list[str]]] = {}
    for line in page.splitlines():
        if line.startswith("## "):
            rows[line.removeprefix("## ")] = {}
        elif line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[list(rows)[-1]][name.strip("`")] = cells
    return rows


@pytest.mark.parametrize(("root", "title"), [(Config, "Recipe"), (ServiceConfig, "File of frpo serve")])
def test_every_field_stands_on_the_configuration_page(root: Any, title: str) -> None:
    rows, schema = rows_of(load_hook("configuration").write_page()), root.model_json_schema()
    sections = {title: schema["properties"]}
    sections |= {name: section["properties"] for name, section in schema["$defs"].items()}
    assert len(sections) > 6
    for name, fields in sections.items():
        assert list(rows[name]) == list(fields)
        assert all(len(cells) == 4 and cells[3] for cells in rows[name].values())


def test_a_row_of_the_configuration_page_says_kind_default_and_what_is_redone() -> None:
    rows = rows_of(load_hook("configuration").write_page())
    assert rows["RolloutConfig"]["top_p"][:3] == ["number > 0 ≤ 1", "`1.0`", ""]
    assert rows["RolloutConfig"]["sleep"][:3] == ["boolean", "`false`", "nothing"]
    assert rows["RolloutConfig"]["max_new_tokens"] == [
        "integer > 0",
        "`256`",
        "base",
        "Length limit of a completion.",
    ]
    assert rows["Recipe"]["rollout"][:3] == ["[RolloutConfig](#rolloutconfig)", "", "rlhf"]
    assert rows["Recipe"]["certify"][:2] == ["[CertifyConfig](#certifyconfig) or null", "`null`"]
    assert rows["DatasetConfig"]["part"][:2] == ["`all`, `train`, `heldout`", "`all`"]
    assert "At `rollout`." in load_hook("configuration").write_page()


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Its pages, built without a warning and without a way to fetch anything."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return {page.relative_to(folder).as_posix(): page.read_text() for page in folder.rglob("*.html")}


@pytest.mark.long
def test_the_site_fetches_nothing_when_it_is_read(site: dict[str, str]) -> None:
    elsewhere = re.compile(r'(?:src|<link [^>]*href)="(https?:[^"]+)"')
    assert {name: links for name, text in site.items() if (links := elsewhere.findall(text))} == {}


@pytest.mark.long
def test_the_readme_is_the_first_page_and_leads_to_the_others(site: dict[str, str]) -> None:
    assert "stay with your own trainer" in site["index.html"]
    for page in ("integrations.html", "architecture.html", "paper.html", "results/index.html"):
        assert f'href="{page}"' in site["index.html"]
        assert page in site
    assert 'href="docs/' not in site["index.html"]


@pytest.mark.long
def test_the_reference_has_every_public_name_and_the_docstrings_of_attributes(site: dict[str, str]) -> None:
    for module in (rewards, config):
        page = site[f"reference/{module.__name__.removeprefix('frpo.')}.html"]
        assert [name for name in module.__all__ if f'id="{module.__name__}.{name}"' not in page] == []
    assert "Routes rewards and mixes data sets." in site["reference/types.html"]
    assert '"&lt;data set&gt;:&lt;row&gt;"' in site["reference/types.html"]  # is text, no HTML
