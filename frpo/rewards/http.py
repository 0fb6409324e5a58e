"""JSON over HTTP to whoever scores: retries with jittered back-off, and fail-over from one URL to the next."""

from __future__ import annotations

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

RETRY_STATUS = {408, 429, 500, 502, 503, 504}
URL_PAUSES_S, RETRY_PAUSES_S = (1.0, 10.0), (0.1, 2.0)
"""First and longest pause before a URL, and before a process of the same cluster, is asked again."""


def pauses(first_s: float, longest_s: float) -> Iterator[float]:
    """Jittered seconds before each further try, twice as long each time; without end."""
    pause = first_s
    while True:
        yield random.uniform(0.5, 1.0) * pause
        pause = min(longest_s, 2 * pause)


def post(urls: str | Sequence[str], body: dict[str, Any], *, api_key_env: str, timeout_s: float = 30.0, tries: int = 4) -> Any:
    """POST JSON to the first URL that answers. Raises RuntimeError with the last URL, its status and what it said.

    A pause, longer each time, comes before a URL is asked again; the next URL is tried at once.
    """
    choices = [urls] if isinstance(urls, str) else list(urls)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(api_key_env):
        headers["Authorization"] = f"Bearer {key}"
    reason, url, between = "", choices[0], pauses(*URL_PAUSES_S)
    for attempt in range(tries * len(choices)):
        round_, turn = divmod(attempt, len(choices))
        if round_ and turn == 0:
            time.sleep(next(between))
        url = choices[turn]
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason} {error.read(300).decode(errors='replace')}".strip()
            if error.code not in RETRY_STATUS:
                break
        except (urllib.error.URLError, TimeoutError, ConnectionError, json.JSONDecodeError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise RuntimeError(f"{url}: {reason} after {attempt + 1} tries")
