"""What a run says while it runs: metrics.jsonl, samples.jsonl, the boards that numbers go to, the progress
display and run.log.

Owns every output of a run but its results; computes nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from frpo.advice import Adviser
from frpo.boards import IDS, Board, curves_of, open_boards
from frpo.config import Config, ConfigError
from frpo.records import Evaluation, Sample, to_json
from frpo.rows import METRICS, SAMPLES, append_rows, read_rows, write_rows
from frpo.stats import BatchStats, FinetuneStats, GateStats, Phases, StepMetrics, Times, UpdateStats
from frpo.types import ScoredGroup

LONGEST_SAMPLE = 2000
"""Of what training draws, characters kept for people to read: a step adds two completions."""
PLAIN_EVERY_S = 5.0
"""Without a terminal, a line at most this often."""


def read_steps(folder: Path, stage: str) -> list[StepMetrics]:
    """The steps of an rlhf stage, in order. Raises ConfigError for rows that another version wrote."""
    rows = [row for row in read_rows(folder) if row["kind"] == "step" and row["stage"] == stage]
    try:
        return [step_of(row) for row in rows]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / METRICS}: another version of frpo wrote its rows ({type(error).__name__}: {error}); "
            "give another --run-dir, or read it with that version"
        ) from None


def step_of(row: Mapping[str, Any]) -> StepMetrics:
    """A row as JSON has it; null in place of what was no number."""
    errors = tuple(row["batch"]["errors"])
    drawn = tuple((began, ended) for began, ended in row["times"]["drawn"])
    gate = row["batch"]["gate"]
    return StepMetrics(
        step=row["step"],
        policy_version=row["policy_version"],
        batch=BatchStats(**{**row["batch"], "errors": errors, "gate": GateStats(**gate) if gate else None}),
        update=UpdateStats(**row["update"]),
        phases=Phases(**row["phases"]),
        times=Times(**{**row["times"], "drawn": drawn}),
        published_bytes=row["published_bytes"],
    )


class Rate(ProgressColumn):
    """What the stage last measured."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("status", ""), style="cyan")


class LogFile(logging.FileHandler):
    """run.log. What it cannot take, on a disk that is full, is told by whoever ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class RunLog:
    """The outputs of one run. Use as a context manager. With a label it is one of several that share a
    screen: plain lines, each begun by the label."""

    def __init__(self, folder: Path, config: Config, label: str = "") -> None:
        self.folder, self.config, self.label = folder, config, label
        self.console = Console(stderr=False, soft_wrap=True, highlight=False)
        self.rich = self.console.is_terminal and not label
        self.progress: Progress | None = None
        self.total, self.started, self.start_step, self.last_line = 0, 0.0, 0, 0.0
        self.where = "before the first stage"
        self.boards: list[Board] = []
        self.advisers: dict[str, Adviser] = {}

    def __enter__(self) -> RunLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / METRICS).open("a")
        self.logger = logging.getLogger("frpo")
        self.handler = LogFile(self.folder / "run.log")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.logger.addHandler(self.handler)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error and not isinstance(error, SystemExit):  # else whoever ends the process has said why
            self.logger.info("stopped (%s): %s", self.where, error or type(error).__name__)
        self._stop_progress()
        self._close_boards()
        self.logger.removeHandler(self.handler)
        for file in (self.file, self.handler):
            with suppress(OSError) if error else nullcontext():  # which would hide what ends the run
                file.close()

    # ---- words

    def note(self, text: str) -> None:
        """One line for the person who watches, and for run.log."""
        (self.progress.console if self.progress else self.console).print(self.label + text, markup=False)
        sys.stdout.flush()
        self.logger.info(text)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what a long start waits for, and how long it took."""
        began = time.perf_counter()
        if self.rich:
            self.logger.info("%s ...", what)
            with self.console.status(Text(f"{what} ...")):
                yield
        else:
            self.note(f"{what} ...")
            yield
        self.note(f"{what}: {time.perf_counter() - began:.1f} s")

    # ---- stages

    def begin(self, stage: str, total: int, start: int = 0) -> None:
        """A stage with `total` steps starts, or goes on after `start`: rows of steps that will be done again
        are dropped."""
        self._forget(stage, start)
        self.advisers[stage] = Adviser(self.config.rollout.max_new_tokens)
        for row in read_steps(self.folder, stage):
            self.advisers[stage].see(row)  # what was told before the run was resumed
        self.total, self.started, self.start_step = total, time.perf_counter(), start
        self.where = f"{stage}, after step {start}"
        if self.rich:
            self._stop_progress()
            self.progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                Rate(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task(stage, total=total, completed=start)
        else:
            self.note(f"{stage}: {total - start} steps to do")

    def end(self, stage: str) -> None:
        self._stop_progress()
        self.note(f"{stage}: done in {time.perf_counter() - self.started:.1f} s")

    def _stop_progress(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def _forget(self, stage: str, start: int) -> None:
        """Drop this stage's rows after `start`, which are about to be written again, and a torn last line."""
        for name in (METRICS, SAMPLES):
            rows = list(read_rows(self.folder, name))
            self._rewrite(name, [r for r in rows if r["stage"] != stage or r.get("step", 0) <= start])

    def _rewrite(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.file.close()
        write_rows(self.folder, name, rows)
        self.file = (self.folder / METRICS).open("a")

    def put_aside(self, superseded: Collection[str], prolonged: Collection[str], folder: Path) -> None:
        """Move the rows and curves of superseded stages into the same files of `folder`; rows of prolonged
        stages are copied. What comes then is another run to W&B and MLflow."""
        self._close_boards()  # they hold files open that are moved
        for name in (METRICS, SAMPLES):
            rows = list(read_rows(self.folder, name))
            append_rows(
                folder, name, [r for r in rows if r["stage"] in superseded or r["stage"] in prolonged]
            )
            self._rewrite(name, [r for r in rows if r["stage"] not in superseded])
        for curves in [curves_of(self.folder, stage) for stage in superseded]:
            if curves.is_dir():
                (folder / curves.parent.name).mkdir(parents=True, exist_ok=True)
                curves.rename(folder / curves.parent.name / curves.name)
        for known in [self.folder / name for name in IDS]:
            if superseded and known.exists():
                folder.mkdir(parents=True, exist_ok=True)
                known.rename(folder / known.name)

    # ---- numbers

    def step(self, stage: str, metrics: StepMetrics) -> None:
        batch, update = metrics.batch, metrics.update
        kl = "" if update.kl is None else f"  KL {update.kl:.3f}"
        rate = batch.num_tokens / metrics.phases.step_s
        status = f"reward {batch.reward:.3f}{kl}  entropy {update.entropy:.2f}  {rate:.0f} tokens/s"
        self._row("step", stage, metrics.step, metrics, status)
        for text in self.advisers[stage].see(metrics):
            self.note(f"{stage} {text}")

    def data(self, counts: Mapping[str, int]) -> None:
        """What reading the data has counted, for the report."""
        self._write("data", "data", counts)

    def finetune_step(self, stage: str, step: int, stats: FinetuneStats) -> None:
        status = f"loss {stats.loss:.4f}  {stats.num_tokens / stats.seconds:.0f} tokens/s"
        self._row("finetune", stage, step, stats, status)

    def evaluation(self, stage: str, evaluation: Evaluation, *, step: int, kind: str = "evaluation") -> None:
        values = evaluation.model_dump(mode="json", exclude={"samples"})
        rewards = "  ".join(f"{t.task} {t.reward.mean:.3f}" for t in evaluation.rewards)
        kl = f"  KL to reference {evaluation.kl_reference.mean:.3f}" if evaluation.kl_reference else ""
        self._write(kind, stage, {**values, "step": step})
        self._write_samples(kind, stage, step, evaluation.samples)
        self._boards(stage, step, {f"{kind}/{t.task}": t.reward.mean for t in evaluation.rewards})
        self.note(f"{stage} step {step}: {kind} {rewards}{kl}")

    def drawn(self, stage: str, step: int, scored: ScoredGroup) -> None:
        """Of a group that was trained on: its completions of the highest and of the lowest reward, or the
        first where none has one. Each text is cut to LONGEST_SAMPLE characters."""
        prompt = scored.group.prompt
        totals = {j: reward.total for j, reward in enumerate(scored.rewards) if reward.total is not None}
        order = sorted(totals, key=totals.__getitem__) or [0]
        samples = [
            Sample(
                task=prompt.task,
                prompt=prompt.text[:LONGEST_SAMPLE],
                completion=scored.group.completions[j].text[:LONGEST_SAMPLE],
                reward=totals.get(j),
            )
            for j in dict.fromkeys((order[-1], order[0]))
        ]
        self._write_samples("drawn", stage, step, samples)

    def _write_samples(self, kind: str, stage: str, step: int, samples: Iterable[Sample]) -> None:
        rows = [{"kind": kind, "stage": stage, "step": step, **sample.model_dump()} for sample in samples]
        append_rows(self.folder, SAMPLES, rows)

    def _row(
        self, kind: str, stage: str, step: int, record: StepMetrics | FinetuneStats, status: str
    ) -> None:
        self.where = f"{stage}, after step {step}"
        self._write(kind, stage, {"step": step, **asdict(record)})
        self._boards(stage, step, numbers_of(record))
        now = time.perf_counter()
        if self.progress:
            self.progress.update(self.task, completed=step, status=status)
        elif step == self.total or step == self.start_step + 1 or now - self.last_line > PLAIN_EVERY_S:
            left = (now - self.started) / max(1, step - self.start_step) * (self.total - step)
            self.note(f"{stage} step {step}/{self.total}: {status}  {left:.0f} s left")
            self.last_line = now
        self.logger.info("%s step %d/%d: %s", stage, step, self.total, status)

    def _write(self, kind: str, stage: str, values: Mapping[str, Any]) -> None:
        self.file.write(to_json({"kind": kind, "stage": stage, "time": time.time(), **values}) + "\n")
        self.file.flush()

    def _close_boards(self) -> None:
        for board in self.boards:
            board.close()
        self.boards = []

    def _boards(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if not self.boards:
            self.boards = open_boards(self.config, self.folder, self.note)
        for board in self.boards:
            board.add(stage, step, values)


def numbers_of(record: Any) -> dict[str, float]:
    """Numbers of a record by name, those of its mappings as name/key and those of records in it by their own
    names, which no two of them share; None is left out."""
    numbers: dict[str, float] = {}
    for field in fields(record):
        name, value = field.name, getattr(record, field.name)
        if is_dataclass(value):
            numbers |= numbers_of(value)
        elif isinstance(value, Mapping):
            numbers |= {f"{name}/{key}": float(of) for key, of in value.items()}
        elif isinstance(value, int | float) and name != "step":
            numbers[name] = float(value)
    return numbers
