"""report.json -> report.html, sweep.json -> sweep.html. Numbers come from the records alone."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader

from frpo.records import Estimate
from frpo.report import plots, sweep_plots
from frpo.report.bootstrap import Interval
from frpo.report.schema import Report, reward_of
from frpo.report.sweep import Sweep


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def estimate(value: Estimate | None) -> str:
    """± is left out where a single prompt gives none."""
    if value is None:
        return "–"
    return f"{value.mean:.2f}" if value.half is None else f"{value.mean:.2f} ± {value.half:.2f}"


def level(value: Interval | None) -> str:
    return "–" if value is None else f"{value.mean:.2f} [{value.lo:.2f}, {value.hi:.2f}]"


def difference(value: Interval | None) -> str:
    return "–" if value is None else f"{value.mean:+.3f} [{value.lo:+.3f}, {value.hi:+.3f}]"


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("frpo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(number=number, estimate=estimate, level=level, difference=difference)
    return found


def render(report: Report) -> str:
    drawings = {
        name: getattr(plots, name)(report)
        for name in ("downstream", "certificate", "plane", "training", "phases")
    }
    return _environment().get_template("page.html.j2").render(r=report, svg=drawings, reward_of=reward_of)


def render_sweep(sweep: Sweep) -> str:
    drawings = {
        name: getattr(sweep_plots, name)(sweep)
        for name in ("trade_off", "differences", "over_lam", "coverage")
    }
    return _environment().get_template("sweep.html.j2").render(s=sweep, svg=drawings)
