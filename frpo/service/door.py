"""What a request passes before any of it is parsed: the token, then the size of its body and the time that it
takes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frpo.config.service import LimitsConfig

OPEN_PATHS = ("/healthz", "/readyz")
RETRY_AFTER_S = 1
TYPES = {
    401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large",
    415: "unsupported", 422: "invalid", 429: "too_many", 500: "internal", 503: "unavailable", 504: "timeout",
}  # fmt: skip


def problem_response(status: int, message: str, given: Mapping[str, str] | None = None) -> JSONResponse:
    headers = dict(given or {})
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": {"type": TYPES.get(status, "error"), "message": message}}, status, headers)


class Door:
    """`digest` is the SHA-256 of the token, 32 bytes; None asks for none. The token itself never comes
    here."""

    def __init__(self, app: ASGIApp, *, digest: bytes | None, limits: LimitsConfig) -> None:
        self.app = app
        self.digest = digest
        self.limits = limits
        self.max_body = int(limits.max_body_mib * 2**20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in OPEN_PATHS and not knows_token(headers.get(b"authorization", b""), self.digest):
            refusal = problem_response(401, "send the service's token: Authorization: Bearer <token>")
            await refusal(scope, receive, send)
            return
        try:
            body = await self._read_body(headers, receive)
        except ClientDisconnect:
            return
        if isinstance(body, JSONResponse):
            await body(scope, receive, send)
            return
        waiting = [body]

        async def again() -> Message:
            if not waiting:
                return await receive()
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}

        await self.app(scope, again, send)

    async def _read_body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | JSONResponse:
        """The body, or the answer to one that is too large or does not come. Raises ClientDisconnect."""
        length = headers.get(b"content-length", b"")
        told = int(length[:20]) if length.isdigit() else 0
        body = None
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                if told <= self.max_body:
                    body = await self._read(receive)
        except TimeoutError:
            return problem_response(
                408, f"the body did not come within {self.limits.timeout_s:g} s (limits.timeout_s)"
            )
        if body is not None:
            return body
        return problem_response(
            413,
            f"the body is larger than {self.max_body} bytes (limits.max_body_mib); send fewer items at once",
        )

    async def _read(self, receive: Receive) -> bytes | None:
        """None when it is too large: one that tells no length must not grow without bound either.

        Raises ClientDisconnect.
        """
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                return None
        return bytes(body)


def knows_token(header: bytes, digest: bytes | None) -> bool:
    """Whether an Authorization header holds the token of which this is the SHA-256; None asks for none.

    Bearer (RFC 6750), or the password of Basic (RFC 7617): clients that know only a URL write
    http://frpo:TOKEN@host/..."""
    if digest is None:
        return True
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            value = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b"bearer":
        return False
    return hmac.compare_digest(hashlib.sha256(value.strip()).digest(), digest)
