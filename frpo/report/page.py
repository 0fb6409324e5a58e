"""report.json -> report.html. Numbers come from the report alone."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader

from frpo.records import Estimate
from frpo.report import plots
from frpo.report.data import Report, reward_of


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def estimate(value: Estimate | None) -> str:
    return "–" if value is None else f"{value.mean:.2f} ± {1.96 * value.se:.2f}"


def render(report: Report) -> str:
    environment = Environment(loader=PackageLoader("frpo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, estimate=estimate)
    drawings = {name: getattr(plots, name)(report) for name in ("downstream", "certificate", "plane", "training", "phases")}
    return environment.get_template("page.html.j2").render(r=report, svg=drawings, reward_of=reward_of)
