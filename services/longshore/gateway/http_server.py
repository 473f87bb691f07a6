"""uvicorn on a socket of ours: bound beside the launcher's reservation, drained by our own stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp

from longshore.errors import ConfigError
from longshore.launcher.ports import bind_shared

log = structlog.get_logger()

# Connections at a time; each may be an event stream.
_MAX_CONNECTIONS = 512
_KEEP_ALIVE_S = 30
_BIND_TIMEOUT_S = 30.0


class _Server(uvicorn.Server):
    """Without signal handlers of its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_http(
    app: ASGIApp, listen: str, drain_s: float, stop: asyncio.Event, on_listening: Callable[[str], Awaitable[None]]
) -> None:
    """Serves until `stop` is set, then lets requests end for `drain_s` seconds. `on_listening` is told the address.

    Raises:
        ConfigError: the address cannot be had.
    """
    listener = _bind(listen)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(drain_s)),
        server_header=False,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.wait_for(server.listening.wait(), _BIND_TIMEOUT_S)
        host, port = listener.getsockname()[:2]
        log.info("serving http", address=f"{host}:{port}")
        await on_listening(f"{host}:{port}")
        await stop.wait()
    finally:
        server.should_exit = True
        await serving


def _bind(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return bind_shared(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"LONGSHORE_HTTP_LISTEN {address}: {error}") from None
