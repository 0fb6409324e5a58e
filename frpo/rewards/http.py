"""JSON over HTTP to whoever scores: retries with jittered back-off, and fail-over from one URL to the
next."""

from __future__ import annotations

import json
import math
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any

from frpo.config.service import is_loopback

RETRY_STATUS = {408, 429, 500, 502, 503, 504}
URL_PAUSES_S = (1.0, 10.0)
"""First and longest pause before a URL is asked again."""
RETRY_PAUSES_S = (0.1, 2.0)
"""The same before a process of the same cluster is asked again."""
MAX_ANSWER = 2**26
"""Bytes of an answer."""


def draw_pauses(first_s: float, longest_s: float) -> Iterator[float]:
    """Jittered seconds before each further try, twice as long each time; without end."""
    pause = first_s
    while True:
        yield random.uniform(0.5, 1.0) * pause
        pause = min(longest_s, 2 * pause)


class Again(Exception):
    """A try failed in a way that another may not. `pause_s`: how long the server asks to wait, seconds
    (Retry-After)."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def post_json(
    urls: str | Sequence[str],
    body: dict[str, Any],
    *,
    api_key_env: str,
    timeout_s: float = 30.0,
    tries: int = 4,
    deadline_s: float = math.inf,
) -> Any:
    """POST JSON to the first URL that answers. Raises RuntimeError with the last URL, its status and what it
    said.

    `timeout_s` is that of one try, `deadline_s` that of them all, the pauses included: the last reason is
    raised before it passes. A pause, longer each time, comes before a URL is asked again; the next URL is
    tried at once.
    """
    choices = [urls] if isinstance(urls, str) else list(urls)
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(api_key_env):
        headers["Authorization"] = f"Bearer {key}"
    until = time.monotonic() + deadline_s
    between = draw_pauses(*URL_PAUSES_S)
    asked_pause_s = 0.0
    reason = f"no time left of {deadline_s:g} s"
    url = choices[0]
    made = 0
    for attempt in range(tries * len(choices)):
        turn = attempt % len(choices)
        pause_s = 0.0
        if attempt and turn == 0:
            pause_s = max(next(between), asked_pause_s)
            asked_pause_s = 0.0
        if time.monotonic() + pause_s >= until:
            break
        if pause_s:
            time.sleep(pause_s)
        url = choices[turn]
        made += 1
        try:
            left_s = min(timeout_s, until - time.monotonic())
            return _request_once(urllib.request.Request(url, data, headers), left_s)
        except Again as error:
            reason = str(error)
            asked_pause_s = max(asked_pause_s, error.pause_s)
    raise RuntimeError(f"{url}: {reason} after {made} tries")


def _request_once(request: urllib.request.Request, timeout_s: float) -> Any:
    """The answer to one try. Raises Again, or RuntimeError for what another try can't mend."""
    try:
        with _opener_for(request.full_url).open(request, timeout=timeout_s) as answer:
            read = _read_body(answer, time.monotonic() + timeout_s)
    except urllib.error.HTTPError as error:
        reason = f"{error.code} {error.reason} {error.read(300).decode(errors='replace')}".strip()
        if 300 <= error.code < 400:
            raise RuntimeError(
                f"{request.full_url}: {reason} to {error.headers.get('Location')}; give that address"
            ) from None
        if error.code not in RETRY_STATUS:
            raise RuntimeError(f"{request.full_url}: {reason}") from None
        after = error.headers.get("Retry-After", "")
        raise Again(reason, float(after) if after.isdigit() else 0.0) from None
    except (urllib.error.URLError, OSError, HTTPException) as error:
        raise Again(str(getattr(error, "reason", error)) or type(error).__name__) from None
    try:
        return json.loads(read)
    except ValueError:
        raise Again(f"the answer is no JSON: {bytes(read[:60])!r}") from None


def _read_body(answer: HTTPResponse, until: float) -> bytearray:
    """The body. Raises OSError where it does not come in time, or is too long."""
    read = bytearray()
    while piece := answer.read1(2**16):
        read += piece
        if len(read) > MAX_ANSWER:
            raise OSError(f"the answer is longer than {MAX_ANSWER} bytes")
        if time.monotonic() > until:
            raise TimeoutError("the answer did not come in time")
    return read


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: none keeps a POST's body, and the token is not for another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _opener_for(url: str) -> urllib.request.OpenerDirector:
    """By the proxy of the environment, loopback never: a proxy can't reach it."""
    direct = [urllib.request.ProxyHandler({})] if goes_direct(url) else []
    return urllib.request.build_opener(NoRedirect, *direct)


def goes_direct(url: str) -> bool:
    """Names below localhost too: what is meant for this machine is not for a proxy to see."""
    host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    return is_loopback(host) or host.endswith(".localhost")
