"""Structured logs: JSON lines for machines, colours for a terminal. Secrets are never passed to a logger."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import TextIO, cast

import structlog

from longshore.errors import ConfigError


class _Unfailing(io.TextIOBase):
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def unfailing(stream: TextIO) -> TextIO:
    """A stream for a log: on a full disk its lines are lost, and whoever writes them goes on."""
    return cast("TextIO", _Unfailing(stream))


def configure_logging(service: str, name: str, level: str) -> None:
    """Sets up structlog for this process and binds `service` and `name` to every line.

    Raises:
        ConfigError: the level is unknown.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"LONGSHORE_LOG_LEVEL {level!r}: use debug, info, warning or error")
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([] if terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(unfailing(sys.stderr)),
        cache_logger_on_first_use=True,
    )
    # Libraries that use the standard module are heard from warnings on.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    structlog.contextvars.bind_contextvars(service=service, name=name)
