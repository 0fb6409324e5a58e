"""The view of a run -> HTML, a section each; a section is drawn again only when what it says has changed."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader

from frpo.records import Record
from frpo.watch.describe import MISSING
from frpo.watch.drawing import format_value
from frpo.watch.view import RunView


class Changes(Record):
    version: int
    sections: dict[str, str]
    """HTML by the id of its section."""


@dataclass(frozen=True)
class DrawnSection:
    said: tuple[Any, ...]
    html: str
    version: int
    """With which it became this."""


def format_duration(seconds: float) -> str:
    """Example: 0.04 s, 1.2 s, 35 s, 12 min, 3 h 20 min."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{format_value(round(seconds, 2 if seconds < 1 else 1))} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def format_share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"


def format_fixed(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def format_maybe(value: float | None) -> str:
    return MISSING if value is None else format_value(value)


class LivePage:
    """What the page shows, and since which version each section shows it."""

    def __init__(self) -> None:
        environment = Environment(
            loader=PackageLoader("frpo", "watch"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {
            "duration": format_duration,
            "percent": format_share,
            "value": format_maybe,
            "fixed": format_fixed,
        }
        environment.globals["clock"] = time.time
        self.whole = environment.get_template("page.html.j2")
        self.draw: Any = environment.get_template("sections.html.j2").module
        self.began = int(1000 * time.time())
        """Milliseconds since 1970: above every version of an earlier process, which grew by one a second."""
        self.version = self.began
        self.drawings: dict[str, DrawnSection] = {}
        self.name = ""

    def show(self, view: RunView) -> None:
        """Take over what has changed."""
        self.version += 1
        self.name = view.name
        sections: dict[str, tuple[Any, ...]] = {}
        for name in RunView.model_fields:
            if hasattr(self.draw, name):
                sections[name] = (getattr(view, name),)
        sections["now"] += (view.name, view.seed, view.folder)
        for name, said in sections.items():
            if name not in self.drawings or self.drawings[name].said != said:
                html = str(getattr(self.draw, name)(*said)).strip()
                self.drawings[name] = DrawnSection(said, html, self.version)

    def changes(self, after: int) -> Changes:
        """Since a version; everything since one that is not of this process."""
        known = after if self.began < after <= self.version else 0
        fresh = {name: drawing.html for name, drawing in self.drawings.items() if drawing.version > known}
        return Changes(version=self.version, sections=fresh)

    def render(self, now: float) -> tuple[str, str]:
        """The whole page, and the nonce of its script."""
        nonce = secrets.token_urlsafe(16)
        everything = self.changes(0)
        page = self.whole.render(
            name=self.name, version=self.version, now=now, nonce=nonce, sections=everything.sections
        )
        return page, nonce
