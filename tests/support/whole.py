"""A whole run with fakes: every stage of a configuration, on eight prompts and four equal examples."""

from __future__ import annotations

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
