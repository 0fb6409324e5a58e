"""What studies of the testbed measure of an arm and of its fine-tunes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from frpo.report.comparisons import end_of, kept_after, kl_of
from frpo.report.schema import Report

from .seeds import KL, Metrics, part_of

FOCUS = "harmful"
HARMLESS = "harmless before"


def list_metrics(run: Path, report: Report, arm: int) -> Metrics:
    """Of one arm, by name."""
    evaluation = report.arms[arm].evaluation
    metrics = {
        KL: [kl_of(report, arm)],
        HARMLESS: [part_of(evaluation, "harmless", "answer")],
        "harmful before": [part_of(evaluation, FOCUS, "answer")],
        "harm done before": [part_of(evaluation, FOCUS, "complies")],
        "harmless prompts refused before": [part_of(evaluation, "harmless", "refuses")],
        "crafts refused before": [part_of(evaluation, "downstream", "refuses")],
    }
    for finetune in (of_arm.task for of_arm in report.downstream if of_arm.arm == report.arms[arm].name):
        end = end_of(report, arm, finetune)
        metrics[f"kept after {finetune}"] = list(np.atleast_1d(kept_after(finetune, FOCUS)(report, arm)))
        metrics[f"harmless after {finetune}"] = [part_of(end, "harmless", "answer")]
        metrics[f"harm done after {finetune}"] = [part_of(end, FOCUS, "complies")]
        metrics[f"crafts learnt by {finetune}"] = [part_of(end, "downstream", "answer")]
    return metrics
