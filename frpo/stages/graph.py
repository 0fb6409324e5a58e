"""Which stages a run has, and what each depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from frpo import checkpoint
from frpo.config import Config, DatasetConfig


@dataclass(frozen=True)
class Stage:
    name: str
    """base, or <kind>/<arm>, or <kind>/<arm>/<task or radius>; its folder in the run."""
    inputs: str
    """SHA-256 of all that the stage's result depends on."""
    arm: str = ""
    """Name; empty for stages of the base."""
    task: str = ""
    """Name, for stages of a downstream fine-tune."""
    radius: float | None = None
    """For attack stages, nats."""

    @property
    def kind(self) -> str:
        return self.name.split("/")[0]


def stages_of(config: Config) -> list[Stage]:
    """Every stage in order, with the hash of its inputs: data files count by content, names and resources do not count
    where they change no number."""
    tree = config.model_dump(mode="json")
    data, rollout = tree["data"], tree["rollout"]
    measured = [data["heldout"], data["max_prompt_tokens"], rollout["max_new_tokens"], rollout["stop"], tree["rewards"], tree["evaluate"]]
    files = _files([*config.data.heldout, *(config.base.data if config.base else ())])
    base = Stage("base", _hash(tree["seed"], tree["model"], tree["base"], measured, files))
    harness = config.harness
    benchmarks = [harness and harness.model_dump(exclude={"timeout_s"}), _hashes(harness.tasks if harness else ())]
    found = [base]
    if harness:
        found.append(Stage("harness/base", _hash(base.inputs, benchmarks)))
    for arm in config.arms:
        own = arm.model_dump(mode="json", exclude={"name"})
        trained = [data["train"], data["mix"], rollout, tree["max_failed_rewards"], _files(config.data.train)]
        rlhf = Stage(f"rlhf/{arm.name}", _hash(base.inputs, own, trained), arm.name)
        found.append(rlhf)
        if harness:
            found.append(Stage(f"harness/{arm.name}", _hash(rlhf.inputs, benchmarks), arm.name))
        if config.certify:
            found.append(Stage(f"certify/{arm.name}", _hash(rlhf.inputs, tree["certify"]), arm.name))
        for task in config.downstream:
            spec = task.model_dump(mode="json", exclude={"name"})
            name = f"downstream/{arm.name}/{task.name}"
            found.append(Stage(name, _hash(rlhf.inputs, spec, _files(task.sources)), arm.name, task.name))
            if harness:
                found.append(Stage(f"harness/{arm.name}/{task.name}", _hash(found[-1].inputs, benchmarks), arm.name, task.name))
        if attack := config.attack:
            found += [
                Stage(f"attack/{arm.name}/{r:g}", _hash(rlhf.inputs, attack.num_steps, attack.mix, r), arm.name, radius=r)
                for r in attack.radii
            ]
    return found


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _files(sources: Sequence[DatasetConfig]) -> list[str]:
    return _hashes([s.path for s in sources])


def _hashes(paths: Sequence[str]) -> list[str]:
    return [checkpoint.sha256(Path(p)) for p in paths if Path(p).is_file()]
