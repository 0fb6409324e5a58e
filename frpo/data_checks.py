"""All rows of a run's data sets, read once before it starts: what is wrong in them, what is let pass and
should be known, and what held-out prompts share with training. Imports no ML library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from frpo.config import ConfigError, DatasetConfig
from frpo.sources import TAKEN, Conversation, Row, normalize_text, read_dataset

MAX_OVERLAP = 0.5
"""Share of the held-out prompts that may be training prompts too; above it nothing is held out in earnest."""


@dataclass(frozen=True)
class Overlap:
    """Held-out prompts that are training prompts too, compared by `normal`."""

    shared: int
    heldout: int
    """Different held-out prompts, as `normal` tells them apart."""

    def __str__(self) -> str:
        return (
            f"{self.shared} of {self.heldout} held-out prompts are training prompts too (case, blanks and "
            "last mark aside)"
        )


def identity_of(prompt: str | Conversation) -> str:
    """What two rows share when they are the same prompt to a model: `normal` text of all turns but the
    system's."""
    if isinstance(prompt, str):
        return normalize_text(prompt)
    turns = [message for message in prompt if message["role"] not in ("system", "developer")]
    return "\n".join([normalize_text(message["content"]) for message in turns])


def measure_overlap(train: Iterable[str], heldout: Iterable[str]) -> Overlap:
    """Of identities. Raises ConfigError where more than MAX_OVERLAP of the held-out prompts are trained
    on."""
    trained = set(map(hash, train))
    measured = set(map(hash, heldout))
    both = Overlap(len(trained & measured), len(measured))
    if both.shared > MAX_OVERLAP * both.heldout:
        raise ConfigError(
            f"data.heldout: {both}, more than the {MAX_OVERLAP:.0%} that are let pass; give other prompts, "
            "or split one file with heldout_share and part"
        )
    return both


@dataclass(frozen=True)
class Checked:
    """What reading all rows once has found."""

    rows: int
    notes: tuple[str, ...]
    """What is let pass, and should be known."""


class Reading:
    """Reads data sets row by row, counting and noting. `progress` is told the count of rows, every
    thousand."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.progress = progress
        self.count = 0
        self.notes = list[str]()

    def rows(self, sources: Sequence[DatasetConfig], examples: bool = False) -> Iterator[Row]:
        """Raises ConfigError at the first row that is wrong, or when a source is empty."""
        for source in sources:
            before = self.count
            noted = examples
            for row in read_dataset(source, examples):
                self.count += 1
                if not noted and not TAKEN.isdisjoint(row.columns):
                    names = ", ".join(sorted(TAKEN & set(row.columns)))
                    self.notes.append(
                        f"{row.where}: reward functions do not get the column {names}, but what frpo calls "
                        "so; rename it"
                    )
                    noted = True
                if self.count % 1000 == 0:
                    self.progress(self.count)
                yield row
            if self.count == before:
                raise ConfigError(
                    f"data set {source.path}: no row left after where, part and limit, or none in the file; "
                    "check them"
                )


def check_rows(
    train: Sequence[DatasetConfig],
    heldout: Sequence[DatasetConfig] = (),
    prompts: Sequence[DatasetConfig] = (),
    examples: Sequence[DatasetConfig] = (),
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> Checked:
    """Read every row once: training and held-out prompts, other prompts, examples to fine-tune on. Raises
    ConfigError at the first row that is wrong, when a source is empty, and when too many held-out prompts are
    trained on."""
    reading = Reading(progress)
    trained = (identity_of(row.prompt) for row in reading.rows(train))
    measured = (identity_of(row.prompt) for row in reading.rows(heldout))
    shared = measure_overlap(trained, measured)
    for _ in chain(reading.rows(prompts), reading.rows(examples, examples=True)):
        pass
    notes = list(reading.notes)
    if shared.shared:
        notes.append(str(shared))
    return Checked(reading.count, tuple(notes))
