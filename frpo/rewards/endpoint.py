"""Rewards of others by URL, in OpenRLHF's format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from frpo.config import UrlReward
from frpo.rewards.calling import messages_of
from frpo.rewards.http import post_json
from frpo.types import Item

AT_ONCE = 8


class UrlScorer:
    """An endpoint in OpenRLHF's format: {"query", "prompts", "labels"} -> {"rewards"}; `messages` holds the
    conversations besides, null for plain strings."""

    def __init__(self, reward: UrlReward) -> None:
        self.reward = reward

    def __call__(self, items: Sequence[Item]) -> list[Any]:
        """One value per item. When the endpoint refuses a batch each item is sent by itself: an exception for
        those refused again.

        Raises TimeoutError when there is no answer within the reward's time limit.
        """
        try:
            return self._send_all([items], self._send)[0]
        except TimeoutError:
            raise
        except Exception as error:
            if len(items) == 1:
                return [error]
        answers = self._send_all([[item] for item in items], self._try_send)
        return list(chain.from_iterable(answers))

    def _send_all(
        self, batches: Sequence[Sequence[Item]], send: Callable[[Sequence[Item]], list[Any]]
    ) -> list[list[Any]]:
        """The answers of separate requests, side by side. The threads hold no more than a connection, which
        has its own limit."""
        reward = self.reward
        pool = ThreadPoolExecutor(min(len(batches), AT_ONCE))
        try:
            return list(pool.map(send, batches, timeout=reward.timeout_s))
        except TimeoutError:
            raise TimeoutError(
                f"took longer than {reward.timeout_s:g} s (rewards.{reward.name}.timeout_s)"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _try_send(self, items: Sequence[Item]) -> list[Any]:
        try:
            return self._send(items)
        except Exception as error:
            return [error] * len(items)

    def _send(self, items: Sequence[Item]) -> list[Any]:
        reward = self.reward
        body = {
            "query": [item.prompt + item.completion + item.ending for item in items],
            "prompts": [item.prompt for item in items],
            "labels": [item.columns.get(reward.label) for item in items],
            "messages": [messages_of(item) if item.messages else None for item in items],
        }
        one_try = reward.timeout_s / (
            len(reward.urls) + 1
        )  # so that there is time for another when one hangs
        answer = post_json(
            reward.urls, body, api_key_env=reward.token_env, timeout_s=one_try, tries=reward.tries
        )
        return list(answer["rewards"])
