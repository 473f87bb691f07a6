"""`longshore healthcheck`: what a container's health check runs."""

from __future__ import annotations

import asyncio
import os
import sys

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longshore.errors import ConfigError
from longshore.rpc.channel import channel

TIMEOUT_S = 5.0
_ANYWHERE = ("0.0.0.0:", "[::]:")


def check(address: str) -> int:
    """Asks grpc.health.v1 for the empty service name, over TLS where the process listens so; 0: it serves.

    Raises:
        ConfigError: there is nothing to ask.
    """
    target = address or own_address()
    return 0 if asyncio.run(_serves(target)) else 1


def own_address() -> str:
    """Where this container's process listens, by its own settings. Raises ConfigError when they do not say."""
    if os.environ.get("LONGSHORE_SOCKETS_DIR") and not os.environ.get("LONGSHORE_LISTEN"):
        from longshore.launcher.worker_config import WorkerSettings

        return WorkerSettings.from_environment().address(os.environ.get("LONGSHORE_SERVICE", ""))
    listen = os.environ.get("LONGSHORE_LISTEN", "")
    if not listen or (listen.endswith(":0") and not listen.startswith("unix:")):
        raise ConfigError(f"LONGSHORE_LISTEN {listen!r} does not say where to ask: name an address")
    for anywhere in _ANYWHERE:
        if listen.startswith(anywhere):
            return f"localhost:{listen.removeprefix(anywhere)}"
    return listen


async def _serves(target: str) -> bool:
    async with channel(target) as asked:
        try:
            request = health_pb2.HealthCheckRequest(service="")
            answer = await health_pb2_grpc.HealthStub(asked).Check(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            sys.stderr.write(f"longshore: {target} does not answer: {error.details() or error.code().name}\n")
            return False
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.stderr.write(f"longshore: {target} says {status}\n")
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
