"""What a run folder holds, kept up to date by reading what is new in it."""

from __future__ import annotations

import json
import platform
import re
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from frpo.advice import Adviser
from frpo.config import Config, ConfigError
from frpo.metrics import step_of
from frpo.outline import KINDS, Stage, list_stages
from frpo.outline.stage import parse_stage
from frpo.recipe import load_recipe
from frpo.records import Evaluation
from frpo.rows import METRICS, SAMPLES
from frpo.stages.folders import DONE, MADE
from frpo.stats import StepMetrics
from frpo.watch.tail import Tail

CONFIG, LOCK, LOG = "config.yaml", "run.lock", "run.log"
LOCKS = Path("/proc/locks")
"""Linux tells there who holds which file."""
TOLD = 12
"""Lines of the log that are kept."""
DRAWN = 12
"""Completions of training that are kept, of the last steps."""
OF_A_STEP = re.compile(r"^\S+ \S+ \S+ step \d+/\d+: ")
"""A line of run.log that says no more than a row of metrics.jsonl."""

Stamp = tuple[int, int]
"""Size and time of change, nanoseconds since 1970."""
Owner = Literal["here", "nobody", "unknown"]


@dataclass
class StageRows:
    """What the files hold of one stage."""

    steps: list[StepMetrics] = field(default_factory=list)
    """Where it runs the loop."""
    losses: list[tuple[int, float | None]] = field(default_factory=list)
    """(step, loss) where it is fine-tuned on examples."""
    times: list[tuple[int, float]] = field(default_factory=list)
    """(step, seconds since 1970) of both."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Validations are left out."""
    warnings: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last one; 0 before any."""
        return self.times[-1][0] if self.times else 0


@dataclass(frozen=True)
class SampleRow:
    stage: str
    step: int
    task: str
    prompt: str
    completion: str
    reward: float | None


@dataclass(frozen=True)
class StageFiles:
    """What lies in the folder of a stage."""

    began: float | None = None
    """Seconds since 1970; None before."""
    took: float | None = None
    """Seconds; None while it is not done."""


@dataclass
class RunFolder:
    """Raises ConfigError where no run has written to the folder. What cannot be read is counted, or told."""

    path: Path
    rows: dict[str, StageRows] = field(default_factory=lambda: defaultdict(StageRows))
    samples: list[SampleRow] = field(default_factory=list)
    """Of measurements."""
    drawn: deque[SampleRow] = field(default_factory=lambda: deque(maxlen=DRAWN))
    """Of training, newest last."""
    said: deque[str] = field(default_factory=lambda: deque(maxlen=TOLD))
    files: dict[str, StageFiles] = field(default_factory=dict)
    """By stage, in order."""
    config: Config | None = None
    problem: str = ""
    """Why the configuration cannot be read."""
    stages: tuple[Stage, ...] = ()
    """Those of the configuration, in order."""
    num_steps: dict[str, int] = field(default_factory=dict)
    """Of the stages that train."""
    owner: Owner = "unknown"
    """Who works in it: a process of this machine, nobody, or perhaps one of another machine."""
    unread: int = 0
    """Rows that another version of frpo wrote."""

    def __post_init__(self) -> None:
        refuse_other_folders(self.path)
        self.tails = {name: Tail(self.path / name) for name in (METRICS, SAMPLES, LOG)}
        self.config_stamp: Stamp | None = None
        self.looked: dict[str, tuple[tuple[Stamp, Stamp | None], StageFiles]] = {}
        """By stage: stamps of its files, and what they said."""
        self.advisers: dict[str, Adviser] = {}

    def refresh(self) -> bool:
        """Read what is new; whether anything is."""
        configured = self._read_config()
        news = {name: tail.read() for name, tail in self.tails.items()}
        if news[METRICS].anew:
            self.rows.clear()
            self.advisers.clear()
            self.unread = 0
        for line in news[METRICS].lines:
            self._add_row(line)
        if news[SAMPLES].anew:
            self.samples.clear()
            self.drawn.clear()
        for line in news[SAMPLES].lines:
            self._add_sample(line)
        self.said.extend(line for line in news[LOG].lines if line and not OF_A_STEP.match(line))
        before = (self.files, self.owner)
        self.files = {name: self._look_at(name) for name in self._stage_names()}
        self.owner = find_owner(self.path / LOCK)
        return configured or any(news.values()) or before != (self.files, self.owner)

    # ---- the configuration, and the stages that it asks for

    def _read_config(self) -> bool:
        stamp = _stamp_of(self.path / CONFIG)
        if stamp == self.config_stamp:
            return False
        self.config_stamp = stamp
        self.config, self.problem, self.stages, self.num_steps = None, "", (), {}
        if stamp:
            try:
                self.config = load_recipe(self.path / CONFIG)
                self.stages = list_stages(self.config)
                trainings = {stage.name: stage.training() for stage in self.stages}
                self.num_steps = {name: of.num_steps for name, of in trainings.items() if of}
            except ConfigError as error:
                self.problem = str(error).splitlines()[0]
        return True

    def _stage_names(self) -> list[str]:
        """Without a configuration, those that have left something."""
        if self.stages:
            return [stage.name for stage in self.stages]
        names: list[str] = []
        for kind in KINDS:
            made = {str(file.parent.relative_to(self.path)) for file in (self.path / kind).rglob(MADE)}
            names += sorted(made | {name for name in self.rows if parse_stage(name).kind == kind})
        return names

    def _look_at(self, stage: str) -> StageFiles:
        made, done = (_stamp_of(self.path / stage / name) for name in (MADE, DONE))
        if made is None:
            return StageFiles()
        stamps = (made, done)
        if stage not in self.looked or self.looked[stage][0] != stamps:
            took = _read_seconds(self.path / stage) if done else None
            self.looked[stage] = (stamps, StageFiles(began=made[1] / 1e9, took=took))
        return self.looked[stage][1]

    # ---- rows

    def _add_row(self, line: str) -> None:
        try:
            row = json.loads(line)
            kind, stage = row["kind"], row["stage"]
            if kind in ("step", "finetune"):
                self._add_step(kind, stage, row)
            elif kind == "evaluation":
                fields = {name: row[name] for name in Evaluation.model_fields if name in row}
                self.rows[stage].evaluations.append(Evaluation(**{**fields, "samples": ()}))
        except json.JSONDecodeError:
            return  # torn by a crash
        except (KeyError, TypeError, ValidationError):
            self.unread += 1

    def _add_step(self, kind: str, stage: str, row: Mapping[str, Any]) -> None:
        time = (row["step"], row["time"])
        if kind == "finetune":
            self.rows[stage].losses.append((row["step"], row["loss"]))
        else:
            step = step_of(row)
            self.rows[stage].steps.append(step)
            limit = self.config.rollout.max_new_tokens if self.config else 0
            self.rows[stage].warnings += self.advisers.setdefault(stage, Adviser(limit)).see(step)
        self.rows[stage].times.append(time)

    def _add_sample(self, line: str) -> None:
        try:
            row = json.loads(line)
            drawn = row.get("kind") == "drawn"
            sample = SampleRow(**{name: row[name] for name in SampleRow.__dataclass_fields__})
        except json.JSONDecodeError:
            return
        except (KeyError, TypeError, AttributeError):
            self.unread += 1
            return
        (self.drawn if drawn else self.samples).append(sample)

    @property
    def heard(self) -> float | None:
        """When the run last wrote something, seconds since 1970."""
        stamps = [_stamp_of(self.path / name) for name in (METRICS, LOG)]
        return max((stamp[1] / 1e9 for stamp in stamps if stamp), default=None)


def refuse_other_folders(path: Path) -> None:
    """Raises ConfigError where no run has written to a folder."""
    if not path.is_dir():
        raise ConfigError(f"watch: {path} is no folder; give that of a run (frpo run says which it is)")
    if (path / METRICS).exists() or (path / CONFIG).exists():
        return
    runs = sorted(metrics.parent.name for metrics in path.glob(f"*/{METRICS}"))
    there = f"it holds runs, watch one of them: {', '.join(runs[:8])}" if runs else f"it has no {METRICS}"
    raise ConfigError(f"watch: {path} is not the folder of a run; {there}")


def find_owner(lock: Path) -> Owner:
    """Of the lock of a run folder, without ever taking it: a run that starts meanwhile would be refused."""
    try:
        process, _, host = lock.read_text().removeprefix("process ").partition(" on ")
        held = [line.split() for line in LOCKS.read_text().splitlines()]
        inode = lock.stat().st_ino
    except (OSError, UnicodeDecodeError):
        return "unknown"
    if host != platform.node():
        return "unknown"
    files = [words[5].rpartition(":")[2] for words in held if words[1] == "FLOCK" and words[4] == process]
    return "here" if str(inode) in files else "nobody"


def _stamp_of(path: Path) -> Stamp | None:
    """None for a file that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _read_seconds(folder: Path) -> float | None:
    """What a stage took; None where its result is not of what it was last begun from."""
    try:
        made = json.loads((folder / MADE).read_text())
        done = json.loads((folder / DONE).read_text())
        return float(done["seconds"]) if done["inputs"] == made["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
