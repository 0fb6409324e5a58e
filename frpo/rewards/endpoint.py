"""Rewards of others by URL, in OpenRLHF's format."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from frpo.config import UrlReward
from frpo.rewards.calling import conversation
from frpo.rewards.http import post
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
            return self._in_time([items])[0]
        except TimeoutError:
            raise
        except Exception as error:
            if len(items) == 1:
                return [error]
        return [value for answer in self._in_time([[item] for item in items], tried=True) for value in answer]

    def _in_time(self, batches: Sequence[Sequence[Item]], tried: bool = False) -> list[list[Any]]:
        """The answers of separate requests, side by side. The threads hold no more than a connection, which
        has its own limit."""
        r = self.reward
        pool = ThreadPoolExecutor(min(len(batches), AT_ONCE))
        try:
            send = self._tried if tried else self._send
            return list(pool.map(send, batches, timeout=r.timeout_s))
        except TimeoutError:
            raise TimeoutError(f"took longer than {r.timeout_s:g} s (rewards.{r.name}.timeout_s)") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _tried(self, items: Sequence[Item]) -> list[Any]:
        try:
            return self._send(items)
        except Exception as error:
            return [error] * len(items)

    def _send(self, items: Sequence[Item]) -> list[Any]:
        body = {
            "query": [i.prompt + i.completion + i.ending for i in items],
            "prompts": [i.prompt for i in items],
            "labels": [i.columns.get(self.reward.label) for i in items],
            "messages": [conversation(i) if i.messages else None for i in items],
        }
        r = self.reward
        one_try = r.timeout_s / (len(r.urls) + 1)  # so that there is time for another when one hangs
        answer = post(r.urls, body, api_key_env=r.token_env, timeout_s=one_try, tries=r.tries)
        return list(answer["rewards"])
