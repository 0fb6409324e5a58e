"""The records of a run, a sweep or an audit -> its page. Numbers come from the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from frpo.report import plots, sweep_plots
from frpo.report.audit_headline import describe_audit, describe_fine_tune, format_left
from frpo.report.audit_plots import draw_audits
from frpo.report.audit_schema import Audit, join_rows, tell_models_apart
from frpo.report.drawing import share_styles
from frpo.report.formats import (
    format_difference,
    format_level,
    format_number,
)
from frpo.report.frontier_plots import draw_frontier
from frpo.report.intervals import MIN_SEEDS
from frpo.report.lookup import task_reward
from frpo.report.schema import Report
from frpo.report.sweep import Sweep
from frpo.report.tables import tabulate_kept, tabulate_others
from frpo.report.timeline_plots import draw_timeline

LICENCE = "floating_ui/LICENSE"
"""Asks to stand in every copy."""
SCRIPTS = (
    "floating_ui/floating-ui.core.umd.min.js",
    "floating_ui/floating-ui.dom.umd.min.js",
    "values.js",
)
"""Of every page, in order: Floating UI 1.8.0 (https://floating-ui.com, MIT) places what values.js says."""


def _make_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("frpo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_number
    environment.filters["level"] = format_level
    environment.filters["difference"] = format_difference
    texts = {name: files("frpo.report").joinpath(name).read_text() for name in (LICENCE, *SCRIPTS)}
    environment.globals["licence"] = texts.pop(LICENCE)
    environment.globals["scripts"] = list(texts.values())
    return environment


def _render(template: str, **given: Any) -> str:
    return share_styles(_make_environment().get_template(f"{template}.html.j2").render(given))


def render_run(report: Report) -> str:
    """The page of one run."""
    lost_less = [task for task in report.tasks if task != report.focus]
    drawn = {
        "downstream": plots.draw_downstream(report, [report.focus] if report.focus else []),
        "others": plots.draw_downstream(report, lost_less),
        "certificate": plots.draw_planes(report),
        "plane": plots.draw_reward_over_kl(report),
        "frontier": draw_frontier(report),
        "training": plots.draw_training(report),
        "timeline": draw_timeline(report.timeline),
    }
    tables = {"kept": tabulate_kept(report), "others": tabulate_others(report)}
    names = [arm.name for arm in report.arms]
    return _render("page", r=report, drawn=drawn, tables=tables, reward_of=task_reward, index_of=names.index)


def render_audits(audits: Sequence[Audit]) -> str:
    """The page of an audit, or of several side by side."""
    return _render(
        "audit",
        audits=audits,
        names=tell_models_apart(audits),
        numbers=[format_left(audit) for audit in audits],
        words=[list(describe_audit(audit)) for audit in audits],
        rows=join_rows(audits),
        describe=describe_fine_tune,
        drawn=draw_audits(audits),
    )


def render_sweep(sweep: Sweep) -> str:
    """The page of a sweep."""
    drawn = {
        "trade_off": sweep_plots.draw_trade_off(sweep),
        "differences": sweep_plots.draw_differences(sweep),
        "over_lam": sweep_plots.draw_over_lam(sweep),
        "coverage": sweep_plots.draw_coverage(sweep),
    }
    return _render(
        "sweep", s=sweep, drawn=drawn, families=sweep_plots.families_of(sweep), min_seeds=MIN_SEEDS
    )
