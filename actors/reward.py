"""Reward actors: the scoring class in a process of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from frpo.actors._calls import Actors, ProcessId, this_process
from frpo.actors.judge import JudgePool
from frpo.config import Combine, ConfigError, JudgeReward, RewardConfig, ServeReward
from frpo.rewards.http import RETRY_PAUSES_S, draw_pauses
from frpo.rewards.scoring import Call, RewardScorer
from frpo.roles import Pending
from frpo.secrets import NO_SECRETS, Secrets
from frpo.types import Group, Item, Reward

ANSWER_LIMIT_S = 30.0
"""Longest wait for a service to say which rewards it has."""
GROUPS_AT_ONCE = 2
"""Scored side by side, so that one with a completion that hangs does not hold up the next."""
JUDGED_AT_ONCE = 16
"""The same where a judge has a GPU, whose engine answers many at the price of one."""
NO_JUDGES: Mapping[str, Callable[[], JudgePool]] = {}


class ServedReward:
    """A reward service in the same cluster. A gateway that dies is asked again until the reward's time is
    up."""

    def __init__(self, reward: ServeReward) -> None:
        from ray import serve

        self.reward, self.handle = reward, serve.get_app_handle(reward.app)

    def __call__(self, items: list[Item]) -> list[Reward]:
        deadline = time.monotonic() + self.reward.timeout_s
        for pause in draw_pauses(*RETRY_PAUSES_S):
            try:
                answer: Any = self.handle.score.remote(items, self.reward.rewards)
                return list(answer.result(timeout_s=deadline - time.monotonic()))
            except RayActorError:
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
        raise AssertionError("the pauses have no end")


def check_services_run(rewards: Sequence[RewardConfig]) -> None:
    """That the cluster, joined already, runs the services that the rewards name. Raises ConfigError."""
    asked = [(i, reward) for i, reward in enumerate(rewards) if isinstance(reward, ServeReward)]
    if not asked:
        return
    from ray import serve

    running = serve.status().applications
    for i, reward in asked:
        if reward.app not in running:
            raise ConfigError(
                f"rewards.{i}.app: no Serve application {reward.app!r} on this Ray cluster (it has: "
                f"{', '.join(running) or 'none'}); start `frpo serve` on the cluster first"
            )
        answer: Any = serve.get_app_handle(reward.app).names.remote()
        names: list[str] = answer.result(timeout_s=ANSWER_LIMIT_S)
        unknown = sorted(set(reward.rewards) - set(names))
        if unknown:
            raise ConfigError(
                f"rewards.{i}.rewards: {reward.app} has no reward {unknown[0]!r}; it has {', '.join(names)}"
            )


class RewardWorker:
    """All rewards of the run. An async actor: its calls overlap, and it answers pings meanwhile. `judges`
    holds by the name of a reward what makes the pool of its engines."""

    def __init__(
        self,
        rewards: tuple[RewardConfig, ...],
        combine: Combine,
        secrets: Secrets = NO_SECRETS,
        judges: Mapping[str, Callable[[], JudgePool]] = NO_JUDGES,
    ) -> None:
        secrets.place()

        def handle(reward: ServeReward | JudgeReward) -> Call:
            return ServedReward(reward) if isinstance(reward, ServeReward) else judges[reward.name]()

        self.scorer = RewardScorer(rewards, combine, handle=handle)
        on_gpus = any(isinstance(reward, JudgeReward) and reward.num_gpus > 0 for reward in rewards)
        self.threads = ThreadPoolExecutor(JUDGED_AT_ONCE if on_gpus else GROUPS_AT_ONCE)

    async def ping(self) -> ProcessId:
        """Load functions and reward models, so that no call's time limit counts it."""
        await asyncio.get_running_loop().run_in_executor(self.threads, self.scorer.load)
        return this_process()

    async def score(self, group: Group) -> tuple[Reward, ...]:
        """k rewards, in the order of the completions."""
        loop = asyncio.get_running_loop()
        return tuple(await loop.run_in_executor(self.threads, self.scorer.score, items_of(group)))


def items_of(group: Group) -> list[Item]:
    prompt = group.prompt
    return [
        Item(
            prompt.text,
            completion.text,
            prompt.task,
            prompt.columns,
            messages=prompt.messages,
            conversational=prompt.conversational,
            completion_ids=tuple(completion.token_ids.tolist()),
            step=group.policy_version,
        )
        for completion in group.completions
    ]


class RewardPool:
    """All reward workers; implements roles.Rewards."""

    def __init__(
        self,
        handles: Sequence[ActorHandle[RewardWorker]],
        *,
        timeout_s: float,
        restarts: int,
        judges: Sequence[JudgePool] = (),
    ) -> None:
        self.actors: Actors[RewardWorker] = Actors("reward", handles, timeout_s=timeout_s, restarts=restarts)
        self.judges = tuple(judges)
        """Whom the workers ask."""

    def score(self, group: Group) -> Pending[tuple[Reward, ...]]:
        return self.actors.call_async(group.index % len(self.actors), RewardWorker.score, group)
