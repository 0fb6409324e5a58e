"""How pages draw: inline SVG whose text stays text and whose colours are CSS variables, so that one drawing
serves light and dark. What belongs to an arm has its class, so that a page shows and hides it; what has a
value says it when it is pointed at."""

from __future__ import annotations

import html
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
GRID = "#010204"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "path.simplify_threshold": 0.5,
    "savefig.transparent": True,
}
PAPER: Any = STYLE | {
    "text.color": "black",
    "axes.labelcolor": "black",
    "xtick.color": "black",
    "ytick.color": "black",
    "axes.edgecolor": "0.8",
    "grid.color": "0.9",
    "savefig.transparent": False,
}
"""For pictures that stand alone."""
PALETTE = ("#2563c9", "#d2620a", "#18875a", "#8a4fc7", "#b3335f", "#7a6a00", "#0f7f8c", "#6b7280")
NUM_COLOURS = len(PALETTE)
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
"""Of the first eight arms, of the eight after them, and so on: their colours repeat."""
PATH = re.compile(r' (?:d|x|y|transform)="[^"]*"')
LOOK = re.compile(r' style="[^"]*"')
DECIMALS = re.compile(r"(\.\d)\d+")
"""A tenth of a point is enough."""
SPARE = re.compile(
    r'<metadata>.*?</metadata>|font-family: [^;]*; | transform="rotate\(-0 [^"]*"|\n *', re.DOTALL
)
"""What no reader sees: the page has a font of its own."""
MARKED = re.compile(r'<g id="mark:(\d*):([^"]*)">')
NAMED = re.compile(r'<g id="[^"]*">')
"""Groups that nothing refers to."""
STYLED = re.compile(r'(<(?:use|path|text) [^>]*?)style="([^"]*)"')
LONE = re.compile(r"<g>(<use [^>]*/>)</g>")


def colour_of(index: int) -> str:
    """Of an arm: on a page the placeholder of its CSS variable, on paper the colour itself."""
    number = index % NUM_COLOURS
    return f"#0a0b{number:02x}" if plt.rcParams["text.color"] == INK else PALETTE[number]


def marker_of(index: int) -> str:
    """Of an arm: arms of one colour have different ones."""
    return MARKERS[(index + index // NUM_COLOURS) % len(MARKERS)]


def line_of(index: int) -> str:
    """Of an arm: those of the first arms are drawn through."""
    return LINES[index // NUM_COLOURS % len(LINES)]


def write_svg(figure: Figure, title: str) -> str:
    """The drawing as text that stands on a page; closes the figure."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": title}):  # identifiers of several drawings on one page must differ
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    for i in range(NUM_COLOURS):
        text = text.replace(f"#0a0b{i:02x}", f"var(--arm-{i})")
    box = re.search(r'viewBox="[^"]+"', text)
    assert box
    label = f'role="img" aria-label="{html.escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = f"<svg {box.group()} {label}>" + text[text.index(">") + 1 :]
    text = PATH.sub(_shorten_path, SPARE.sub("", text))
    text = LOOK.sub(lambda look: look.group().replace(": ", ":").replace("; ", ";"), text)
    return LONE.sub(r"\1", NAMED.sub("<g>", MARKED.sub(_say_mark, text)))


def share_styles(page: str) -> str:
    """The same page, where a style that several marks have is a class."""
    counts = Counter(style for _, style in STYLED.findall(page))
    names = {style: f"s{i}" for i, (style, count) in enumerate(counts.items()) if count > 1}

    def name(match: re.Match[str]) -> str:
        before, style = match.groups()
        return f'{before}class="{names[style]}"' if style in names else match.group()

    rules = "\n".join(f".{name} {{ {style} }}" for style, name in names.items())
    return STYLED.sub(name, page).replace("</style>", f"{rules}</style>", 1)


def save_png(figure: Figure, file: Path) -> None:
    """The drawing as a picture that stands alone; closes the figure."""
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def mark(artists: Artist | Iterable[Artist | None], arm: int | None, words: str = "") -> None:
    """What is drawn belongs to an arm, by its number, or to none; `words` are said when it is pointed at."""
    for artist in (artists,) if isinstance(artists, Artist) else artists:
        if artist is not None:
            artist.set_gid(f"mark:{'' if arm is None else arm}:{words}")


def mark_value(axes: Axes, x: float, y: float, arm: int | None, words: str) -> None:
    """A place on a line says `words`, as `mark` has it, though no point is drawn there."""
    place = axes.plot([x], [y], "o", color=INK, markersize=8, markeredgewidth=0, alpha=0, clip_on=False)
    mark(place, arm, words)


def _shorten_path(match: re.Match[str]) -> str:
    path = DECIMALS.sub(r"\1", match.group())
    return path if " C " in path else path.replace(" L ", " ")  # lines follow a move without being named


def _say_mark(match: re.Match[str]) -> str:
    arm, words = match.groups()
    shown = f' class="a{arm}"' if arm else ""
    return f"<g{shown}>" + (f"<title>{words}</title>" if words else "")


@dataclass(frozen=True)
class Panel:
    """A drawing that stands beside others, or above them where the page is narrow."""

    title: str
    svg: str


WIDTH, HEIGHT = 3.1, 2.1
"""Inches. A page shows panels a third to three quarters larger: their text is 13 to 17 px high."""


@contextmanager
def panel(into: list[Panel], section: str, title: str, height: float = HEIGHT) -> Iterator[Axes]:
    """Draw one panel and append it. `section` and `title` name it among all drawings of a page."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        axes.locator_params(axis="x", nbins=6)
        axes.locator_params(axis="y", nbins=6)
        yield axes
        figure.tight_layout(pad=0.3)
        into.append(Panel(title, write_svg(figure, f"{section}: {title}")))


def make_panels(count: int, *, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """`count` panels with common axes, at most `columns` a row; width and height of one in inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharex=True, sharey=True
    )
    for spare in grid.flat[count:]:
        spare.set_visible(False)
    return figure, grid


def add_legend(axes: Axes, columns: int = 4) -> None:
    """Below the figure, of what is drawn in one of its panels."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(columns, len(labels))
        )
