"""How every process lives: start, serve until SIGTERM or SIGINT, drain, exit.

async def main(settings, stop): ...       # returns when `stop` is set and its work is drained
run_process("actor", settings, main)      # exit code 0 drained, 1 failed, 2 wrong settings
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from longshore.errors import ConfigError, LongshoreError
from longshore.settings import ProcessSettings
from longshore.telemetry.log import configure_logging
from longshore.telemetry.metrics import MetricsServer

S = TypeVar("S", bound=ProcessSettings)

log = structlog.get_logger()


def run_process(service: str, settings: S, main: Callable[[S, asyncio.Event], Awaitable[None]]) -> int:
    """Runs one process to its end and returns its exit code."""
    code = 0
    try:
        configure_logging(service, settings.name, settings.log_level)
        asyncio.run(_run(service, settings, main))
    except* ConfigError as group:
        for error in _leaves(group):
            log.error("cannot start", reason=str(error))
            print(f"longshore {service}: {error}", file=sys.stderr)  # noqa: T201 - the person at the terminal
        code = 2
    except* LongshoreError as group:
        for error in _leaves(group):
            log.error("stopped", kind=type(error).__name__, reason=str(error))
        code = 1
    return code


async def _run(service: str, settings: S, main: Callable[[S, asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = MetricsServer(settings.metrics_listen, service)
    metrics.start()
    try:
        await main(settings, stop)
    finally:
        metrics.stop()


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors inside nested exception groups, in order."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


async def wait_or_stop(stop: asyncio.Event, seconds: float) -> bool:
    """Sleeps for `seconds` at most; True when the process was told to stop."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True
