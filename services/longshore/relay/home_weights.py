"""The home site's weight store over gRPC, as `mirror.Home`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from typing import TypeVar

import grpc.aio

from longshore.errors import IntegrityError
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.channel import ClientTls, channel
from longshore.types import JobRef
from longshore.weight_store.bundle import MAX_BUNDLE_BYTES
from longshore.weight_store.decoding import CODECS
from longshore.weights.client import translated

CALL_S = 30.0
# For one stream of bytes, however many come; what is left is asked for by another.
FETCH_S = 600.0
# Versions that home is told of; a path may start from any.
MAX_HAVE = 64

M = TypeVar("M")


class HomeWeights:
    """One job's versions at home, over a connection that stays open: a cold one would have to find its rate."""

    def __init__(self, address: str, job: JobRef, tls: ClientTls | None = None) -> None:
        """
        Args:
            tls: what is shown at home; None: what the environment says.
        """
        self._address = address
        self._job = convert.job_to_proto(job)
        self._channels = [channel(address, tls=tls)]
        self._stub = weights_pb2_grpc.WeightsServiceStub(self._channels[0])

    async def close(self) -> None:
        """Ends every call."""
        for used in self._channels:
            await used.close()

    def reconnect(self, tls: ClientTls | None) -> None:
        """Shows something else from the next call on. Those that run go on until home ends them, as it does when what
        they showed expires."""
        self._channels.append(channel(self._address, tls=tls))
        self._stub = weights_pb2_grpc.WeightsServiceStub(self._channels[-1])

    @contextlib.asynccontextmanager
    async def watch(
        self, pointer: str, have: Sequence[int] | None
    ) -> AsyncIterator[AsyncIterator[weights_pb2.WatchResponse]]:
        """See mirror.Home."""
        push = have is not None
        call = self._stub.Watch(
            weights_pb2.WatchRequest(
                job=self._job,
                pointer=pointer,
                push=push,
                have=_told(have or ()),
                codecs=CODECS if push else (),
            )
        )
        try:
            yield _items(call)
        finally:
            call.cancel()

    async def version(self, version: int, have: Sequence[int]) -> weights_pb2.GetVersionResponse:
        """See mirror.Home."""
        request = weights_pb2.GetVersionRequest(
            job=self._job,
            version=version,
            weight_set=weights_pb2.WEIGHT_SET_POLICY,
            have=_told(have),
            codecs=CODECS,
        )
        with _errors():
            response: weights_pb2.GetVersionResponse = await self._stub.GetVersion(request, timeout=CALL_S)
            return response

    async def fetch(self, sha256: bytes, offset: int) -> AsyncIterator[bytes]:
        """See mirror.Home."""
        request = weights_pb2.FetchRequest(job=self._job, sha256=sha256, offset=offset)
        async for response in _items(self._stub.Fetch(request, timeout=FETCH_S)):
            if response.chunk:
                yield response.chunk

    async def assets(self, sha256: bytes) -> bytes:
        """An asset bundle. Raises IntegrityError: it is another."""
        archive = bytearray()
        async for chunk in self.fetch(sha256, 0):
            archive += chunk
            if len(archive) > MAX_BUNDLE_BYTES:
                raise IntegrityError(f"asset bundle {sha256.hex()} has more bytes than it can have")
        if hashlib.sha256(archive).digest() != sha256:
            raise IntegrityError(f"asset bundle {sha256.hex()} does not match its SHA-256")
        return bytes(archive)

    async def keys(self) -> weights_pb2.GetKeysResponse:
        """See mirror.Home."""
        with _errors():
            response: weights_pb2.GetKeysResponse = await self._stub.GetKeys(
                weights_pb2.GetKeysRequest(job=self._job), timeout=CALL_S
            )
            return response


def _told(have: Sequence[int]) -> Sequence[int]:
    """The newest, and the oldest: that is what a job's adapters are decoded against."""
    return have if len(have) <= MAX_HAVE else [*have[: MAX_HAVE - 1], have[-1]]


async def _items(call: AsyncIterable[M]) -> AsyncIterator[M]:
    with _errors():
        async for item in call:
            yield item


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise translated(error) from None
