"""The tables of a run's page that grow with its arms and fine-tunes: a fine-tune a row, few arms side by
side, so that they fit a page however many there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from frpo.report.formats import MISSING, format_level, format_number
from frpo.report.headline import list_finetunes
from frpo.report.lookup import task_reward
from frpo.report.schema import Downstream, Report

BESIDE = 4
"""Arms in one table."""


@dataclass(frozen=True)
class ArmsTable:
    title: str
    arms: tuple[int, ...]
    """Their numbers."""
    rows: dict[str, tuple[str, ...]]
    """By fine-tune, what each of the arms has."""


def tabulate_kept(report: Report) -> list[ArmsTable]:
    """Reward on the task that lost most."""
    title = f"Reward on {report.focus} prompts after each fine-tune"
    return list(_tabulate(report, title, lambda run: _reward_after(run, report.focus or "")))


def tabulate_others(report: Report) -> list[ArmsTable]:
    """Reward on the other tasks, distances and losses."""
    ends = [run.evaluations[-1] for run in report.downstream]
    measured = itertools.chain.from_iterable(end.rewards for end in ends)
    measures: dict[str, Callable[[Downstream], str]] = {}
    for task in dict.fromkeys(reward.task for reward in measured):
        if task != report.focus:
            measures[f"Reward on {task} prompts, before → after"] = _reward_through(task)
    measures["KL to the reference, nats"] = lambda run: format_level(run.evaluations[-1].kl_reference)
    measures["KL from the arm's policy, nats"] = lambda run: format_level(run.evaluations[-1].kl_policy)
    measures["Loss on held-out examples, before → after, nats per token"] = _loss_through
    tables: list[ArmsTable] = []
    for title, value in measures.items():
        tables += _tabulate(report, title, value)
    return tables


def _tabulate(report: Report, title: str, value: Callable[[Downstream], str]) -> Iterator[ArmsTable]:
    runs = {(run.arm, run.task): run for run in report.downstream}
    finetunes = list_finetunes(report.arms)
    for first in range(0, len(report.arms) if finetunes else 0, BESIDE):
        numbers = tuple(range(first, min(first + BESIDE, len(report.arms))))
        rows: dict[str, tuple[str, ...]] = {}
        for finetune in finetunes:
            mine = [runs.get((report.arms[i].name, finetune)) for i in numbers]
            rows[finetune] = tuple(value(run) if run else MISSING for run in mine)
        yield ArmsTable(title, numbers, rows)


def _reward_after(run: Downstream, task: str) -> str:
    return format_level(task_reward(run.evaluations[-1], task))


def _reward_through(task: str) -> Callable[[Downstream], str]:
    """What it was before the fine-tune, and is after it."""

    def describe_run(run: Downstream) -> str:
        before, after = (task_reward(run.evaluations[i], task) for i in (0, -1))
        return f"{before.mean:z.2f} → {after:z.2f}" if before and after else MISSING

    return describe_run


def _loss_through(run: Downstream) -> str:
    before, after = (run.evaluations[i].downstream_loss for i in (0, -1))
    return MISSING if after is None else f"{format_number(before, 3)} → {format_number(after, 3)}"
