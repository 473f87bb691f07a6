"""uvicorn on a socket of ours: bound beside the launcher's reservation, drained by our own stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import h11
import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from longshore.errors import ConfigError
from longshore.rpc.sockets import bind_shared

log = structlog.get_logger()

# Connections at a time; each may be an event stream.
_MAX_CONNECTIONS = 512
_KEEP_ALIVE_S = 30
_BIND_TIMEOUT_S = 30.0
# For a request's head to come in whole, and for what is left of a body once the request has been answered.
_HEAD_TIMEOUT_S = 15.0
_REST_TIMEOUT_S = 30.0
# For a caller to read what the socket has no room for.
_READER_TIMEOUT_S = 60.0


class _Protocol(H11Protocol):
    """Ends connections that send a request's head, or a body that nobody waits for any more, too slowly, and those
    whose other side does not read.

    uvicorn itself only ends those that are silent between two requests.
    """

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end_after(_HEAD_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is h11.IDLE:
            self._end_after(_HEAD_TIMEOUT_S)
        elif self.conn.their_state is h11.SEND_BODY and answered:
            self._end_after(_REST_TIMEOUT_S)
        else:
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._end_after(_REST_TIMEOUT_S)
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            # The beginning of the next request has come behind this one.
            self._end_after(_HEAD_TIMEOUT_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_READER_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_unread()
        super().connection_lost(exc)

    def _end_after(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


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
    app: ASGIApp,
    listen: str,
    drain_s: float,
    stop: asyncio.Event,
    on_listening: Callable[[str], Awaitable[None]],
    *,
    variable: str = "LONGSHORE_HTTP_LISTEN",
    certificate: tuple[Path, Path] | None = None,
) -> None:
    """Serves until `stop` is set, then lets requests end for `drain_s` seconds. `on_listening` is told the address.

    When it is cancelled, requests are ended at once.

    Args:
        variable: the setting that `listen` came from.
        certificate: PEM files of the certificate's chain and its key; None: plain text.

    Raises:
        ConfigError: the address cannot be had, or the certificate cannot be used.
    """
    listener = _bind(listen, variable)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(drain_s)),
        server_header=False,
        ssl_certfile=certificate[0] if certificate else None,
        ssl_keyfile=certificate[1] if certificate else None,
    )
    try:
        config.load()
    except OSError as error:
        listener.close()
        raise ConfigError(f"certificate {config.ssl_certfile} with key {config.ssl_keyfile}: {error}") from None
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.wait_for(server.listening.wait(), _BIND_TIMEOUT_S)
        host, port = listener.getsockname()[:2]
        log.info("serving http", address=f"{host}:{port}")
        await on_listening(f"{host}:{port}")
        await stop.wait()
    except asyncio.CancelledError:
        server.force_exit = True
        raise
    finally:
        server.should_exit = True
        await serving


def _bind(address: str, variable: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return bind_shared(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"{variable} {address}: {error}") from None
