"""How a command ends that was stopped or that failed: one paragraph, and an exit code that says which."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from frpo.config import Config, ConfigError
from frpo.disk import is_disk_full, tell_disk_full


class Stopped(BaseException):
    """SIGTERM."""

    asked = False
    """Whether it came."""


@contextmanager
def resumable(config: Config, where: Callable[[], str]) -> Iterator[None]:
    """Around what starts actors: a stop or a failure ends it with one paragraph that says how to go on.

    Exit code 1 for a failure, 130 or 143 for a stop; a ConfigError passes.
    """
    from frpo.resources import runs_elsewhere

    again = shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "python -m frpo"), *sys.argv[1:]])
    again = again.replace("'python -m frpo'", "python -m frpo")
    logger = logging.getLogger("frpo")
    signal.signal(signal.SIGTERM, on_sigterm)
    logger.info("started: %s", again)
    if not runs_elsewhere(config):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    from frpo.roles import WorkerFailed
    from frpo.stops import RunStopped

    try:
        yield
    except ConfigError:
        raise
    except (KeyboardInterrupt, Stopped):
        logger.info("stopped by its user (%s)", where())
        _end_stopped(again)
    except Exception as error:
        logger.info("%s", traceback.format_exc())
        if Stopped.asked:  # raised inside a library's C code, it arrives as that library's own error
            _end_stopped(again)
        what = f"failed ({where()}): {type(error).__name__}: {error}"
        if isinstance(error, WorkerFailed | RunStopped):
            what = f"stopped ({where()}): {error}"
        if is_disk_full(error):
            what = f"stopped ({where()}): {tell_disk_full(error)}"
        logger.info("%s", what)
        end_with(f"The run {what}\nIts log is run.log in the run folder. Resume with: {again}", 1)


def _end_stopped(again: str) -> NoReturn:
    print(f"Stopped. Resume with: {again}", flush=True)
    raise SystemExit(143 if Stopped.asked else 130) from None


def on_sigterm(number: int, frame: FrameType | None) -> None:
    Stopped.asked = True
    raise Stopped


def end_with(message: str, code: int) -> NoReturn:
    """The process, with a message on stderr."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)
