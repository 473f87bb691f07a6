"""Asks a process whether it is ready: grpc.health.v1, or PING on a Redis URL."""

from __future__ import annotations

import contextlib

import grpc
import grpc.aio
import redis.asyncio
import redis.exceptions
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from longshore.launcher.spec import Ready, ReadyKind

_TIMEOUT_S = 1.0


async def probe(ready: Ready) -> bool:
    """Whether the process answers within a second. Never raises for a process that is not there."""
    return await (_probe_grpc if ready.kind is ReadyKind.GRPC else _probe_redis)(ready.address)


async def _probe_grpc(address: str) -> bool:
    # A channel of its own without retries or shared subchannels: a refused connection is an answer, not a delay.
    options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        with contextlib.suppress(grpc.RpcError):
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=""), timeout=_TIMEOUT_S
            )
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False


async def _probe_redis(url: str) -> bool:
    client = connect_once(url, _TIMEOUT_S)
    try:
        return bool(await client.ping())
    except (redis.exceptions.RedisError, OSError):
        return False
    finally:
        await client.aclose()


def connect_once(url: str, timeout: float) -> redis.asyncio.Redis:
    """A client that tries once: whether the broker is there now is the question. Raises ValueError for a bad URL."""
    return redis.asyncio.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), retries=0)
    )
