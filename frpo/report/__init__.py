"""Run folder -> report.json -> report.html: one self-contained page, made from report.json alone."""

from __future__ import annotations

import json
from pathlib import Path

from frpo.config import ConfigError

__all__ = ["build", "build_sweep"]


def build(folder: Path) -> Path:
    """Write report.json and report.html; returns the page. Raises ConfigError when the folder holds no finished stage."""
    from frpo.report.data import Report, collect
    from frpo.report.page import render

    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"report: {folder} is no run folder (no config.yaml); give the folder that `frpo run` wrote")
    (folder / "report.json").write_text(collect(folder).model_dump_json(indent=1))
    read_back = Report.model_validate(json.loads((folder / "report.json").read_text()))
    (folder / "report.html").write_text(render(read_back))
    return folder / "report.html"


def build_sweep(folder: Path) -> Path:
    """Write sweep.json and sweep.html of the seeds that are finished; returns the page. Raises ConfigError when none is."""
    from frpo.report.page import render_sweep
    from frpo.report.sweep import Sweep, gather

    (folder / "sweep.json").write_text(gather(folder).model_dump_json(indent=1))
    read_back = Sweep.model_validate_json((folder / "sweep.json").read_text())
    (folder / "sweep.html").write_text(render_sweep(read_back))
    return folder / "sweep.html"
