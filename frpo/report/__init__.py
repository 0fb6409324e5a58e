"""Run folder -> report.json -> report.html: one self-contained page, made from report.json alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from frpo.config import ConfigError

__all__ = ["build_audit", "build_report", "build_sweep", "compare_audits", "read_verdict"]


def build_report(folder: Path, out: Path | None = None) -> Path:
    """Write report.json and report.html of a run into `out`, by default its own folder, where each arm's
    policy gets its model card too; returns the page. Raises ConfigError when the folder holds no finished
    stage."""
    from frpo.report.card import write_cards
    from frpo.report.data import collect_report
    from frpo.report.page import render_run
    from frpo.report.schema import Report

    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"report: {folder} is no run folder (no config.yaml); give the folder that `frpo run` wrote"
        )
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(collect_report(folder).model_dump_json(indent=1))
    read_back = Report.model_validate(json.loads((out / "report.json").read_text()))
    (out / "report.html").write_text(render_run(read_back))
    if out == folder:
        write_cards(read_back, folder)
    return out / "report.html"


def read_verdict(folder: Path) -> str:
    """Of the report in a folder, in one line, or its first sentence where it has none."""
    from frpo.report.schema import Report

    read = Report.model_validate_json((folder / "report.json").read_text())
    if read.verdict is None:
        return read.headline[0]
    decided = read.verdict.decision.capitalize()
    return f"{decided}: {read.verdict.arm} ({read.verdict.policy}). {read.verdict.why[0]}"


def build_sweep(folders: Sequence[Path], out: Path) -> Path:
    """Write sweep.json, sweep.html and their pictures of the finished runs in `folders` (runs or sweeps);
    returns the page.

    Raises ConfigError when none is finished, or they can't be compared.
    """
    from frpo.report.page import render_sweep
    from frpo.report.sweep import Sweep, gather_sweep
    from frpo.report.sweep_plots import save_pictures

    sweep = gather_sweep(folders)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").write_text(sweep.model_dump_json(indent=1))
    read_back = Sweep.model_validate_json((out / "sweep.json").read_text())
    (out / "sweep.html").write_text(render_sweep(read_back))
    save_pictures(read_back, out)
    return out / "sweep.html"


def build_audit(folder: Path, out: Path | None = None) -> Path:
    """Write audit.json and audit.html of an audit into `out`, by default its own folder; returns the page.
    Raises ConfigError when its certificate is not finished."""
    from frpo.report.audit import gather_audit
    from frpo.report.audit_schema import Audit
    from frpo.report.page import render_audits

    audit = gather_audit(folder)
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "audit.json").write_text(audit.model_dump_json(indent=1))
    read_back = Audit.model_validate_json((out / "audit.json").read_text())
    (out / "audit.html").write_text(render_audits([read_back]))
    return out / "audit.html"


def compare_audits(folders: Sequence[Path], out: Path) -> Path:
    """Write a page with the audits in `folders` side by side; returns it. Raises ConfigError for folders that
    hold none, or that measured different things."""
    from frpo.report.audit_schema import read_audit, refuse_unlike
    from frpo.report.page import render_audits

    audits = [read_audit(folder) for folder in folders]
    refuse_unlike(audits)
    out.mkdir(parents=True, exist_ok=True)
    (out / "audit.html").write_text(render_audits(audits))
    return out / "audit.html"
