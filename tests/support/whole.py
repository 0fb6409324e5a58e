"""A whole run with fakes: every stage of a configuration, on eight prompts and four equal examples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from frpo.config import Config
from frpo.metrics import RunLog
from frpo.prompts import Examples
from frpo.roles import Team
from frpo.stages.folders import look_and_tell
from frpo.stages.work import Work
from frpo.types import Prompt
from tests.support import fakes

PROMPTS = [Prompt(f"p:{i}", f"prompt {i}", np.array([9, i], np.int32), "only", {}) for i in range(8)]
REWARDS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
LAST_ANSWER = Examples(((np.array([1], np.int32), np.array([5], np.int32)),) * 4, ("only",) * 4)
DATA = [{"path": "nowhere.jsonl", "task": "only"}]


def configured(folder: Path, **changed: Any) -> Config:
    """A configuration with a stage of every kind."""
    tree = fakes.config(beta=0.0, estimator={"kind": "frpo", "lam": 0.5}).model_dump(
        mode="json", exclude={"arms"}
    )
    asked = {
        "run_dir": str(folder),
        "base": {"num_steps": 2, "batch_size": 2, "data": DATA, "learning_rate": 1e-3},
        "learner": {"num_steps": 6, "num_workers": 1},
        "arms": [{"name": "arm"}],
        "certify": {"completions_per_prompt": 16, "radii": [0.1]},
        "downstream": [
            {"name": "sft", "num_steps": 4, "batch_size": 2, "data": DATA, "heldout": DATA, "marks": [2]},
            {"kind": "rl", "name": "rl", "data": DATA, "learner": {"num_steps": 3}, "marks": [1]},
        ],
        "attack": {"radii": [0.5], "num_steps": 4},
        "harness": {"tasks": ["any"], "max_tokens": 8},
        "evaluate": {"validate_every": 2, "validate_completions": 1, "completions_per_prompt": 4},
        "checkpoint": {"every": 2},
    }
    return Config.model_validate({**tree, **asked, **changed})


def run(config: Config, team: Team | None = None) -> Team:
    """What is not done yet."""
    team = team or fakes.team(config, REWARDS)
    inputs: Any = SimpleNamespace(
        train=PROMPTS,
        heldout=PROMPTS[:2],
        prompts=lambda field, sources: PROMPTS,
        examples=lambda data: LAST_ANSWER,
    )
    with RunLog(config.folder, config) as log:
        log.boards = [SimpleNamespace(add=lambda *_: None, close=lambda: None)]  # type: ignore[list-item]
        for standing in look_and_tell(config, log.note):
            if standing.state != "done":
                Work(config, team, log, inputs).do(standing)
    return team
