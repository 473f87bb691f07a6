"""The gRPC server that every process runs: health, error translation, graceful drain.

Knows nothing of what is served. A process adds its servicers to `RpcServer.server`, calls `start`, and reports
readiness by `set_serving`; the empty service name is SERVING while the process lives.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from longshore import errors
from longshore.rpc.channel import LOOKAHEAD_BYTES, MAX_MESSAGE_BYTES, is_local
from longshore.rpc.server_tls import ServerTls
from longshore.rpc.site_guard import SiteGuard
from longshore.sites.book import SiteBook
from longshore.telemetry.health import HEALTH

log = structlog.get_logger()

_CODES: list[tuple[type[errors.LongshoreError], grpc.StatusCode]] = [
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Conflict, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Rejected, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidJobSpec, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.IntegrityError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.PluginError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
]

Unary = TypeVar("Unary", bound=Callable[..., Awaitable[Any]])
Stream = TypeVar("Stream", bound=Callable[..., AsyncIterator[Any]])


class RpcServer:
    """One grpc.aio server with health. Serves plain text on loopback and Unix sockets, mutual TLS anywhere else."""

    def __init__(
        self,
        listen: str,
        max_receive_bytes: int = MAX_MESSAGE_BYTES,
        *,
        sites: SiteBook | None = None,
        site_methods: frozenset[str] = frozenset(),
    ) -> None:
        """
        Args:
            max_receive_bytes: of one message, unpacked; a larger one is refused unread, with RESOURCE_EXHAUSTED.
            sites: the rollout sites that may call `site_methods` (see SiteGuard).

        Raises:
            ConfigError: of a certificate and its key one is missing or cannot be read.
        """
        self.listen = listen
        self._tls = None if listen.startswith("unix:") else ServerTls.from_environment(sites)
        # Bound at start; differs from `listen` when that asked for port 0.
        self.address = listen
        self.server = grpc.aio.server(
            options=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
                # Our clients ping every 30 s; the default limit would call that abuse.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
            interceptors=[SiteGuard(sites, site_methods)] if self._tls is not None and self._tls.is_mutual else None,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    async def start(self) -> None:
        """Binds and serves. Raises ConfigError when the address is taken or would serve plain text off-machine."""
        try:
            port = self._bind()
        except RuntimeError:
            raise errors.ConfigError(f"cannot listen on {self.listen}: is the port taken?") from None
        if not self.listen.startswith("unix:"):
            self.address = f"{self.listen.rsplit(':', 1)[0]}:{port}"
        await self.server.start()
        await self.set_serving("", True)
        HEALTH.serving(asyncio.get_running_loop())
        log.info("serving", address=self.address)

    def _bind(self) -> int:
        local = is_local(self.listen)
        if self._tls is not None:
            if not self._tls.is_mutual and not local:
                raise errors.ConfigError(
                    f"{self.listen} is not on loopback: set LONGSHORE_TLS_CA, so that callers must show a certificate"
                )
            return self.server.add_secure_port(self.listen, self._tls.credentials())
        if not local:
            raise errors.ConfigError(
                f"{self.listen} is not on loopback: set LONGSHORE_TLS_CERT, LONGSHORE_TLS_KEY and LONGSHORE_TLS_CA"
            )
        return self.server.add_insecure_port(self.listen)

    async def set_serving(self, service: str, serving: bool) -> None:
        """Reports a service's health under its full proto name; the empty name is the process itself."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(service, status)

    async def drain(self, grace_s: float) -> None:
        """Says NOT_SERVING, lets running calls finish for `grace_s` seconds, then ends them."""
        HEALTH.ended()
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def status_of(error: errors.LongshoreError) -> grpc.StatusCode:
    """What a call that ends with this error is told."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
    if isinstance(error, errors.LongshoreError):
        await context.abort(status_of(error), str(error))
    # A bug's text may hold anything, secrets included: it goes to our log, not to the caller.
    log.error("rpc failed", method=method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error in {method}; see the service's log")


def rpc_method(function: Unary) -> Unary:
    """Wraps a unary-response servicer method: LongshoreErrors become their status, anything else INTERNAL."""

    @functools.wraps(function)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await function(self, request, context)
        except (grpc.aio.AbortError, grpc.RpcError):
            raise
        except Exception as error:  # noqa: BLE001 - the request boundary: one bad call must not end the server
            return await _abort(context, error, function.__name__)

    return wrapped  # type: ignore[return-value]


def rpc_stream(function: Stream) -> Stream:
    """As rpc_method, for methods that answer with a stream."""

    @functools.wraps(function)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in function(self, request, context):
                yield response
        except (grpc.aio.AbortError, grpc.RpcError):
            raise
        except Exception as error:  # noqa: BLE001 - the request boundary: one bad call must not end the server
            await _abort(context, error, function.__name__)

    return wrapped  # type: ignore[return-value]
