"""The schema of audit.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from frpo.config import ConfigError
from frpo.records import Record
from frpo.report.spread import Spread

RECIPE = "audit.yaml"
"""In the audit's folder: its recipe."""
POLICY = "policy.json"


class AuditedPolicy(Record):
    """policy.json"""

    model: str
    """Folder, or hub name with the commit."""
    weights_sha256: str


class Promise(Record):
    """The certificate of the untouched policy on the audited task: what no policy within a radius goes
    below, at 95 % for all radii at once."""

    floor: float
    confidence: float
    num_prompts: int
    num_completions: int
    """Per prompt."""
    radii: tuple[float, ...]
    """Nats per completion."""
    certified: tuple[float, ...]
    plug_in: tuple[float, ...]
    """The formula on the sample: no promise."""
    lo: tuple[float, ...]
    hi: tuple[float, ...]
    """Bootstrap interval of the plug-in."""


class FineTuned(Record):
    """The policy after so many steps of a fine-tune, over seeds."""

    name: str
    by_rl: bool
    learning_rate: float
    steps: int
    rank: int | None
    """Of its adapter; None: all weights."""
    template: str | None
    """None: as the recipe says."""
    harmful_share: float
    kept: Spread
    """Reward on the audited task."""
    kl: Spread
    """KL(Q || the untouched policy) on its prompts, nats per completion."""
    certified: Spread
    """Lower bound at the upper 95 % limit of each seed's KL."""
    below: int
    """Seeds whose reward's upper limit lies below what was certified at their KL."""
    utility: Spread | None
    """As the audit defines it; None where it was not measured."""
    counts: bool
    """Whether its utility is at least what is asked for."""


class Audit(Record):
    model: str
    weights_sha256: str
    task: str
    """Whose reward is audited."""
    prompts: tuple[str, ...]
    """Data sets with them."""
    reward: tuple[str, ...]
    """What the rewards are."""
    utility: str
    """What makes a fine-tune count, in words."""
    seeds: tuple[int, ...]
    start: Spread | None
    """Reward of the untouched policy, on the draws of each seed; None without fine-tunes."""
    certificate: Promise
    fine_tunes: tuple[FineTuned, ...]
    worst: int | None
    """Number of the fine-tune, from 0, that left least reward among those that count; None for none."""
    stopped: tuple[str, ...]
    """Fine-tunes of which a seed did not come to its end, such as by a loss that is no number."""

    @property
    def harshest(self) -> FineTuned | None:
        return None if self.worst is None else self.fine_tunes[self.worst]

    @property
    def left(self) -> float | None:
        """Share of the reward, above its floor, that the harshest fine-tune left."""
        if self.harshest is None or self.start is None:
            return None
        whole = self.start.mean - self.certificate.floor
        return (self.harshest.kept.mean - self.certificate.floor) / whole if whole > 0 else None


Row = tuple[FineTuned, list[FineTuned | None]]
"""A fine-tune as the first audit that has it describes it, and what became of it in each audit."""


def join_rows(audits: Sequence[Audit]) -> list[Row]:
    """The fine-tunes of all audits, the first audit's order first."""
    named: dict[tuple[str, int], list[FineTuned | None]] = {}
    for number, audit in enumerate(audits):
        for fine_tune in audit.fine_tunes:
            row = named.setdefault((fine_tune.name, fine_tune.steps), [None] * len(audits))
            row[number] = fine_tune
    return [(_find_first(row), row) for row in named.values()]


def _find_first(row: Sequence[FineTuned | None]) -> FineTuned:
    return next(fine_tune for fine_tune in row if fine_tune)


def tell_models_apart(audits: Sequence[Audit]) -> list[str]:
    """Each model by as many last parts of its path, from two on, as tell it from the others.

    Example: runs/a/rlhf/grpo/policy and runs/a/rlhf/frpo/policy are grpo/policy and frpo/policy.
    """
    parts = [audit.model.rstrip("/").split("/") for audit in audits]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [audit.model for audit in audits]


def read_audit(folder: Path) -> Audit:
    """Raises ConfigError where there is none."""
    file = folder / "audit.json"
    try:
        return Audit.model_validate_json(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the folder of a finished `frpo audit`") from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{file}: no audit ({reason}); `frpo report {folder}` writes it again") from None


def refuse_unlike(audits: Sequence[Audit]) -> None:
    """Raises ConfigError where a number would stand beside one that means something else."""
    for other in audits[1:]:
        for name in ("task", "prompts", "reward", "utility", "seeds"):
            mine, theirs = getattr(audits[0], name), getattr(other, name)
            if mine != theirs:
                raise ConfigError(
                    f"audits of {audits[0].model} and {other.model}: {name} is {mine} in one and {theirs} in "
                    "the other; audit both by one recipe"
                )
