"""The way to the broker: connecting, living through its restarts, loading and calling our functions.

Knows streams and functions in general, and nothing of what a ticket is. Everything here raises BrokerLost once the
broker has been away for longer than the client's patience; each retry and each wait is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.resources
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import redis.exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff
from redis.credentials import CredentialProvider
from redis.maint_notifications import MaintNotificationsConfig

from longshore.errors import ConfigError, Unavailable
from longshore.rollout_queue.keys import ACTORS, LEARNER, SITES, JobKeys, job_prefix
from longshore.types import JobRef

T = TypeVar("T")

# A supervisor has a killed broker back within a few seconds; loading a large append-only file takes some more.
PATIENCE_S = 20.0
CONNECT_TIMEOUT_S = 5.0
# Seconds without a byte on a connection; above the longest blocking read.
SOCKET_TIMEOUT_S = 15.0
MAX_BLOCK_MS = 10_000
MAX_CONNECTIONS = 64
_DELETE_BATCH = 500
# Codes of errors that pass by themselves, once the disk has room or the replicas are back.
_NO_WRITES = ("MISCONF", "NOREPLICAS")

_SOURCE = importlib.resources.files(__package__).joinpath("functions.lua").read_text(encoding="utf-8")
# Named by content: processes of two releases can share a broker, each with the functions that it was written for.
VERSION = hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]
_CODE = _SOURCE.replace("@VERSION@", VERSION)


class BrokerLost(Unavailable, redis.exceptions.ConnectionError):
    """The broker did not answer within the client's patience. What was asked may or may not have happened; asking
    again is safe. Also redis-py's own kind, so that one clause covers commands that went to the client directly."""


class BrokerFull(Unavailable):
    """The broker's memory is full: it takes no new payloads until some are acknowledged. Worth waiting for."""


class _Patience(Retry):
    """Retries for a time rather than a number of times: redis-py nests retries, which would multiply a number."""

    def __init__(self, seconds: float) -> None:
        super().__init__(EqualJitterBackoff(cap=0.5, base=0.02), retries=-1)
        self._seconds = seconds

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        deadline = time.monotonic() + self._seconds

        def worth_it(error: Exception) -> bool:
            in_time = time.monotonic() < deadline and not _refuses_us(error)
            return in_time and (is_retryable is None or is_retryable(error))

        return await super().call_with_retry(do, fail, worth_it, with_failure_count)


class _Login(CredentialProvider):
    """Asks for name and password with each connection: they may change while the client lives."""

    def __init__(self, ask: Callable[[], tuple[str, str]]) -> None:
        self._ask = ask

    def get_credentials(self) -> tuple[str, str]:
        return self._ask()

    async def get_credentials_async(self) -> tuple[str, str]:
        return self._ask()


def connect(
    url: str,
    *,
    patience_s: float = PATIENCE_S,
    login: Callable[[], tuple[str, str]] | None = None,
    authority: bytes | None = None,
) -> Redis:
    """A client for a broker: redis://, rediss:// (options such as ssl_ca_certs in the query) or unix://.

    Connects on first use. A command during a restart of the broker waits for up to `patience_s` seconds, and is made
    again when its reply got lost; with 0, the first failure is the caller's.

    Args:
        login: gives name and password for each new connection, where the URL has none.
        authority: PEM; with rediss://, who must have signed the broker's certificate.

    Raises:
        ConfigError: the URL is malformed.
    """
    more: dict[str, Any] = {}
    if login is not None:
        more["credential_provider"] = _Login(login)
    if authority is not None and url.startswith("rediss://"):
        more["ssl_ca_data"] = authority.decode()
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=max(patience_s, CONNECT_TIMEOUT_S),
            retry=_Patience(patience_s),
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            legacy_responses=False,
            # A feature of Redis Enterprise, which would cost a round trip on each new connection.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            **more,
        )
    except ValueError as error:
        raise ConfigError(f"broker URL: {error}") from None
    return Redis.from_pool(pool)


def _refuses_us(error: BaseException | None) -> bool:
    """Whether it is about our credentials: a ConnectionError to redis-py, or wrapped in one, that no wait mends."""
    kinds = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)
    return error is not None and (isinstance(error, kinds) or isinstance(error.__cause__, kinds))


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Turns what redis-py raises when the broker cannot serve into our errors.

    Raises:
        BrokerLost: no answer within the client's patience.
        BrokerFull: its memory is full.
        Unavailable: the broker answers, but takes no writes: it is a replica, or its disk is full, or too few replicas
            follow it.
        ConfigError: it does not accept our credentials, or they do not allow what was asked.
        CancelledError: the caller was cancelled meanwhile. redis-py sends under asyncio.wait_for, which Python 3.11
            lets swallow a cancellation that comes as the sending ends; a loop so cancelled would go on for ever.
    """
    task = asyncio.current_task()
    cancellations = task.cancelling() if task else 0
    try:
        yield
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        if _refuses_us(error):
            raise ConfigError(f"the broker refuses our credentials: {error}") from None
        raise BrokerLost(f"the broker does not answer: {error}") from error
    except redis.exceptions.OutOfMemoryError as error:
        raise BrokerFull(f"the broker's memory is full: {error}") from error
    except redis.exceptions.NoPermissionError as error:
        raise ConfigError(f"the broker does not let us: {error}") from None
    except redis.exceptions.ReadOnlyError as error:
        raise Unavailable(f"the broker takes no writes: {error}") from error
    except redis.exceptions.ResponseError as error:
        if str(error).startswith(_NO_WRITES):
            raise Unavailable(f"the broker takes no writes: {error}") from error
        raise
    finally:
        if task and task.cancelling() > cancellations:
            raise asyncio.CancelledError


async def ping(client: Redis) -> None:
    """Returns when the broker answers. Raises BrokerLost."""
    with reaching():
        await client.ping()


async def incarnation(client: Redis) -> str:
    """The server's run id. A new one means a restart, which may have lost the last second of writes."""
    with reaching():
        info = await client.info("server")
    return str(info["run_id"])


async def setup(client: Redis, keys: JobKeys) -> None:
    """Loads our functions and makes the streams and groups of a job at a site. Idempotent.

    A broker whose memory is full refuses to be told even what it knows. Who would free that memory comes by here, so
    that is no error.

    Raises:
        BrokerFull: it is full, and something is missing.
    """
    with reaching():
        try:
            await client.function_load(_CODE, replace=True)
            for stream, group in _groups(keys):
                await _make_group(client, stream, group)
        except redis.exceptions.OutOfMemoryError:
            if not await _is_set_up(client, keys):
                raise


def _groups(keys: JobKeys) -> tuple[tuple[str, str], ...]:
    return ((keys.tickets, ACTORS), (keys.leased, SITES), (keys.rollouts, LEARNER))


async def _make_group(client: Redis, stream: str, group: str) -> None:
    try:
        await client.xgroup_create(stream, group, id="0", mkstream=True)
    except redis.exceptions.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


async def _is_set_up(client: Redis, keys: JobKeys) -> bool:
    if not await client.function_list(library=f"longshore_{VERSION}"):
        return False
    for stream, group in _groups(keys):
        found = await client.xinfo_groups(stream) if await client.exists(stream) else []
        if group not in [text(item["name"]) for item in found]:
            return False
    return True


async def healed(client: Redis, keys: JobKeys, command: Callable[[], Awaitable[T]]) -> T:
    """Runs a command; when a broker that lost its tail lacks our functions or groups, sets up and runs it again."""
    with reaching():
        try:
            return await command()
        except redis.exceptions.ResponseError as error:
            if not _is_unprepared(error):
                raise
    await setup(client, keys)
    with reaching():
        return await command()


async def call(client: Redis, keys: JobKeys, function: str, *args: str | bytes | int) -> Any:
    """Calls one of our functions and returns its reply."""
    call_args = _call_args(keys, function, args)
    return await healed(client, keys, lambda: client.fcall(*call_args))


async def call_many(
    client: Redis, keys: JobKeys, function: str, calls: Sequence[Sequence[str | bytes | int]]
) -> list[Any]:
    """Calls a function once for each of `calls`, in one round trip; each call is atomic by itself.

    Returns:
        A reply each, or the BrokerFull that it was refused with.
    """

    async def run() -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        for args in calls:
            pipeline.fcall(*_call_args(keys, function, args))
        replies = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception) and not isinstance(reply, redis.exceptions.OutOfMemoryError):
                raise reply
        return replies

    replies = await healed(client, keys, run)
    return [
        BrokerFull(f"the broker's memory is full: {reply}") if isinstance(reply, Exception) else reply
        for reply in replies
    ]


def _call_args(keys: JobKeys, function: str, args: Sequence[str | bytes | int]) -> tuple[Any, ...]:
    return (f"longshore_{VERSION}_{function}", 1, keys.tickets, keys.site, *args)


def _is_unprepared(error: redis.exceptions.ResponseError) -> bool:
    # A function meets a missing group inside a script, whose error has another beginning.
    return "NOGROUP" in str(error) or "Function not found" in str(error)


Entry = tuple[str, dict[bytes, bytes]]


async def read_group(
    client: Redis, keys: JobKeys, stream: str, group: str, consumer: str, after: str, count: int, block_ms: int
) -> list[Entry]:
    """XREADGROUP on one stream. `block_ms` 0 does not wait; no wait is longer than MAX_BLOCK_MS."""
    block = min(block_ms, MAX_BLOCK_MS) if block_ms > 0 else None
    found = await healed(
        client, keys, lambda: client.xreadgroup(group, consumer, {stream: after}, count=count, block=block)
    )
    return entries_of(found, stream)


def entries_of(reply: Any, stream: str) -> list[Entry]:
    """What XREAD and XREADGROUP found in one stream, with ids as text."""
    # Any: redis-py types the replies of all protocols at once; ours is {stream: [(id, fields)]}.
    return entries(reply.get(stream.encode(), []))


def entries(found: Any) -> list[Entry]:
    """Stream entries, as XRANGE and XAUTOCLAIM give them, with their ids as text."""
    return [(entry_id.decode(), fields) for entry_id, fields in found]


def text(value: bytes | str) -> str:
    """A reply as text, whichever of the two redis-py's types promise."""
    return value.decode() if isinstance(value, bytes) else value


async def forget_job(client: Redis, job: JobRef) -> None:
    """Deletes all keys of a job. Stop its processes first: what they write afterwards stays."""
    # The names hold no other special characters of a pattern than these.
    pattern = "".join(f"\\{c}" if c in "*?[]^\\" else c for c in job_prefix(job)) + "*"
    batch: list[bytes] = []
    with reaching():
        async for name in client.scan_iter(match=pattern, count=1000):
            batch.append(name)
            if len(batch) >= _DELETE_BATCH:
                await client.unlink(*batch)
                batch.clear()
        if batch:
            await client.unlink(*batch)
