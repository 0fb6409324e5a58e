"""What leaves this machine with a policy: configuration and report without its paths, addresses and secrets,
and without anybody's prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from frpo import tree
from frpo.report.schema import Report
from frpo.report.verdict import load_lines
from frpo.secrets import hide_secrets

ENDPOINT = "http://endpoint.invalid"
"""In place of every address that is called (RFC 2606 reserves the name)."""
PRIVATE = ("samples", "prompts")
"""Fields of a report that hold prompts and completions."""


def shorten_path(text: str) -> str:
    """The last part of an absolute path; anything else as it is.

    Example: /data/safety/train.jsonl is train.jsonl, and ../data/train.jsonl stays.
    """
    is_path = os.path.isabs(text) and text.count("/") > 1 and "\n" not in text
    return PurePath(text).name if is_path else text


def strip_config(text: str) -> str:
    """The YAML of a configuration that runs elsewhere, once its data and models lie there."""
    return tree.dump_yaml(_strip(hide_secrets(tree.parse_yaml(text, "config.yaml"))))


def strip_report(report: Report) -> Report:
    """The same numbers with such a configuration, and no prompt or completion."""
    verdict = report.verdict
    if verdict:
        policy = Path("rlhf") / verdict.arm / "policy"
        verdict = verdict.model_copy(update={"policy": str(policy), "load": load_lines(policy)})
    here = {"config": strip_config(report.config), "command": "frpo run config.yaml", "verdict": verdict}
    values = report.model_copy(update=here).model_dump(mode="json")
    return Report.model_validate({**_strip(values), "config": here["config"]})


def _strip(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _strip(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [] if name in PRIVATE else [_strip(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if name == "address":
        return None
    if re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        return ENDPOINT
    return shorten_path(value)
