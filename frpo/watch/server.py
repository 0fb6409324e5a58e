"""Serves the page of one run folder to a browser on this machine. A look at the folder is taken when the page
asks for news, at most one a second: nobody who looks costs nothing."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from frpo.config import ConfigError
from frpo.config.service import TOKEN_ENV, digest_of_token, is_loopback
from frpo.service.door import knows_token
from frpo.watch.describe import describe_run
from frpo.watch.folder import RunFolder
from frpo.watch.page import LivePage

LOOK_EVERY_S = 1.0
STOP_S = 2
"""How long answers under way may take after a stop."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'"
"""What a page that shows the words of models may do: its own script, by nonce, and nothing else."""

log = logging.getLogger("frpo.watch")


class Watcher:
    """A run folder, and the page that it makes; whoever asks first in a second looks again."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.page = LivePage()
        self.lock = threading.Lock()
        self.looked = -LOOK_EVERY_S

    def look(self) -> None:
        """Hold the lock."""
        if time.monotonic() - self.looked < LOOK_EVERY_S:
            return
        if self.folder.refresh() or not self.page.drawings:
            self.page.show(describe_run(self.folder, time.time()))
        self.looked = time.monotonic()

    def whole(self, request: Request) -> Response:
        with self.lock:
            self.look()
            text, nonce = self.page.render(time.time())
        headers = {"Content-Security-Policy": f"{POLICY}; script-src 'nonce-{nonce}'"}
        return HTMLResponse(text, headers=headers | {"Referrer-Policy": "no-referrer"})

    def news(self, request: Request) -> Response:
        after = request.query_params.get("after", "")
        with self.lock:
            self.look()
            changes = self.page.changes(int(after) if after.isdecimal() and len(after) < 20 else 0)
        if not changes.sections:
            return Response(status_code=204)
        return JSONResponse(changes.model_dump())


class Lobby:
    """Asks for the token as browsers do: by Basic (RFC 7617), the token as password."""

    def __init__(self, app: ASGIApp, digest: bytes) -> None:
        self.app, self.digest = app, digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.lower(): value for name, value in scope["headers"]}
            if not knows_token(headers.get(b"authorization", b""), self.digest):
                asked = {"WWW-Authenticate": 'Basic realm="frpo watch: any name, the token as password"'}
                await Response("send the token", 401, asked)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_watch_app(folder: RunFolder, host: str, digest: bytes | None) -> Starlette:
    """`digest`: SHA-256 of the token, 32 bytes; None asks for none."""
    watcher = Watcher(folder)
    middleware = []
    if is_loopback(host):  # else a page of another site could be led here by its name's address
        names = ["localhost", "127.0.0.1", "[::1]", _as_in_url(host)]
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=names))
    if digest:
        middleware.append(Middleware(Lobby, digest=digest))
    routes = [Route("/", watcher.whole), Route("/changes", watcher.news)]
    return Starlette(routes=routes, middleware=middleware)


def _as_in_url(host: str) -> str:
    """With brackets around the colons of IPv6 (RFC 3986, 3.2.2)."""
    return f"[{host}]" if ":" in host else host


def digest_for(host: str) -> bytes | None:
    """Of the token of this process's environment. Raises ConfigError where anybody could look without one."""
    digest = digest_of_token(TOKEN_ENV)
    if digest is None and not is_loopback(host):
        raise ConfigError(
            f"--host: {host} shows the run to whoever reaches it; export a token as {TOKEN_ENV}, or leave "
            "--host out and forward a port (ssh -L)"
        )
    return digest


def bind_socket(host: str, port: int) -> socket.socket:
    """Raises ConfigError where the address cannot be had. Port 0: any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # so that whoever reads the address is answered
    except (OSError, OverflowError) as error:
        bound.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port: {port} on {host} is taken; choose another, or leave it out") from None
        raise ConfigError(f"--host, --port: {host}:{port} can't be bound ({error}); choose another") from None
    return bound


def watch_run(path: Path, host: str, port: int) -> None:
    """Until it is stopped. Raises ConfigError before it serves."""
    digest = digest_for(host)
    folder = RunFolder(path)
    with bind_socket(host, port) as bound:
        place = f"{_as_in_url(host)}:{bound.getsockname()[1]}"
        print(f"frpo watch: {path} at http://{place}/ (Ctrl-C ends it)", flush=True)
        if digest:
            print(f"It asks for a password: the token in {TOKEN_ENV}, with any name.", flush=True)
        config = uvicorn.Config(
            make_watch_app(folder, host, digest),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=STOP_S,
        )
        uvicorn.Server(config).run(sockets=[bound])
