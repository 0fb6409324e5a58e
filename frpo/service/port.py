"""The TCP port of a service: one that is taken is found before anything starts."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from frpo.config import ConfigError
from frpo.config.service import ServiceConfig


@contextmanager
def held_port(config: ServiceConfig) -> Iterator[None]:
    """Nobody else starts to serve at this address meanwhile. Raises ConfigError when somebody does already.

    Ray Serve binds it with SO_REUSEPORT: a second service would not fail, the two would answer at random.
    A socket that is bound and never listens keeps the second out, which looks first as this one did.
    """
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as held:
        # an earlier service's last connections don't count
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(_why_not(config, error)) from None
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # from now on beside SO_REUSEPORT alone
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield


def _why_not(config: ServiceConfig, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port: {config.port} on {config.host} is taken; choose another, or stop who serves there"
    field = "port" if error.errno == errno.EACCES else "host"
    return f"{field}: {config.host}:{config.port} can't be bound ({error.strerror or error}); choose another"
