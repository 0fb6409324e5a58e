"""What is adjusted from one step to the next: lam towards a radius, beta towards a KL to the reference; and
when enough is enough. Pure functions.

Both follow slowly what single, noisy batches say; so a batch misses its radius, and a run its KL, by what
they log.
"""

from __future__ import annotations

import math

from frpo.config import EstimatorConfig, LearnerConfig, ObjectiveConfig
from frpo.objective import Groups, lam_of_radius
from frpo.types import Steering

SMOOTHING = 0.2
"""Weight of the newest batch in log lam."""
INTEGRAL = 0.1
"""Change of log beta when the KL is off by its whole target, for good."""
REACTION = 2.0
"""The same, for the next step alone. Without it beta swings: a policy goes on moving for some steps after its
penalty has changed (attacks on the testbed ended at 1 to 5 times the KL asked for; with it, a simulated
policy ends within a fifth of it)."""
BETA_RANGE = 1e4
"""Beta stays within this factor of its given value, on either side: where the KL cannot be reached it does
not run away."""
WINDOW = 5
"""Batches that stop_at_reward looks at."""
RAMP = 0.5
"""Share of the steps over which the KL aimed at rises to its target."""


def begin_steering(objective: ObjectiveConfig) -> Steering:
    return Steering(beta=objective.beta, centre=objective.beta, lam=None)


def lam_for(groups: Groups, estimator: EstimatorConfig, state: Steering) -> float | None:
    """The temperature of this batch, reward units: the given one, or in radius mode the batch's own, smoothed
    with those before; None for an estimator without one."""
    if estimator.radius is None:
        return estimator.temperature
    own = lam_of_radius(groups, estimator.radius)
    if state.lam is None:
        return own
    return math.exp((1 - SMOOTHING) * math.log(state.lam) + SMOOTHING * math.log(own))


def next_steering(
    state: Steering,
    objective: ObjectiveConfig,
    *,
    lam: float | None,
    kl: float | None,
    reward: float,
    done: float,
) -> Steering:
    """State of the next step. `kl` (nats per completion) and `reward` are what this step's batch measured,
    `done` the share of the steps behind it.

    With `off` how far the KL is from its aim, as a share of the target:

        log centre += INTEGRAL * off,    log beta = log centre + REACTION * off
    """
    beta = centre = state.centre
    if objective.target_kl is not None and kl is not None:
        aim = objective.target_kl * min(1.0, done / RAMP)
        off = min(2.0, max(-1.0, (kl - aim) / objective.target_kl))
        centre = _within_range(centre * math.exp(INTEGRAL * off), objective.beta)
        beta = _within_range(centre * math.exp(REACTION * off), objective.beta)
    rewards = (*state.rewards, reward)[-WINDOW:]
    kept = lam if objective.estimator.radius is not None else None
    return Steering(beta=beta, centre=centre, lam=kept, rewards=rewards)


def _within_range(beta: float, given: float) -> float:
    return min(given * BETA_RANGE, max(given / BETA_RANGE, beta))


def is_finished(state: Steering, learner: LearnerConfig, step: int) -> bool:
    """Whether no step comes after `step`: all are done, or the reward asked for is reached."""
    if step >= learner.num_steps:
        return True
    if learner.stop_at_reward is None or len(state.rewards) < WINDOW:
        return False
    return sum(state.rewards) / WINDOW >= learner.stop_at_reward
