"""The testbed's recipe, as a test sets it."""

from __future__ import annotations

from pathlib import Path

from frpo.config import Config
from frpo.recipe import load_recipe

ROOT = Path(__file__).parents[2]


SHARED = ("rollout.num_gpus=0.5", "learner.num_gpus=0.5", "rollout.sleep=true")


def config(*sets: str) -> Config:
    return load_recipe(ROOT / "recipes" / "testbed.yaml", sets)
