"""Pages of the site that lie elsewhere in the repository, and those of the reference.

Links between them are written for whoever reads the repository; here they are bent to the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/README.md": "deploy.md",
}
"""Pages outside docs/, by their path in the repository, and where they stand on the site."""

REFERENCE: dict[str, tuple[str, ...]] = {
    "types": (),
    "stats": (),
    "roles": (),
    "records": (),
    "config": (),
    "objective": (),
    "estimators": (),
    "penalties": (),
    "certificate": (),
    "rewards": ("judge", "template", "code"),
    "integrations": ("settings", "guard", "trl", "verl"),
}
"""Modules of frpo whose docstrings make a page each, and those inside them that stand on it too."""

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
PAGE_NAME = re.compile(r"(?<![\[`])`((?:docs/|deploy/)?[\w/]+(?:\.md)?)`(?![\]`])")
"""Of inline code that may name a page, and is no link yet."""


class PlainText(Extension):
    """What stands between < and > is text: `<data set>:<row>` in a docstring is no HTML."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(PlainText())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in ELSEWHERE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for module, parts in REFERENCE.items():
        text = f"# frpo.{module}\n\n::: frpo.{module}\n    options: {{show_root_heading: false}}\n"
        text += "".join(f"\n::: frpo.{module}.{part}\n" for part in parts)
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    pages = {file.src_uri for file in files.documentation_pages()}
    return outside_fences(markdown, lambda text: bend_links(text, page.file.src_uri, pages))


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def bend_links(text: str, page: str, pages: set[str]) -> str:
    """Links of a page as the site has them; names of pages become links."""
    source = next((path for path, target in ELSEWHERE.items() if target == page), f"docs/{page}")
    here = posixpath.dirname(page)

    def bend(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        return posixpath.relpath(site_path(path), here)

    def connect(name: re.Match[str]) -> str:
        target = site_path(name[1])
        target = f"{target}/README.md" if f"{target}/README.md" in pages else target
        if target not in pages or target == page:
            return name[0]
        return f"[{name[0]}]({posixpath.relpath(target, here)})"

    return PAGE_NAME.sub(connect, LINK.sub(bend, text))


def site_path(path: str) -> str:
    """Where a file of the repository stands on the site."""
    return ELSEWHERE.get(path, path.removeprefix("docs/"))
