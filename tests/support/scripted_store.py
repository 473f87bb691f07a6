"""A weight store over real gRPC that sends what a test made, be it right or wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from weight_parcels import JOB, KEY

from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc.server import RpcServer
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store.version import sign_pointer
from longshore.weights.parcel import Parcel

Script = Sequence[weights_pb2.WatchResponse]


def pushed(parcel: Parcel, data: bytes | None = None) -> list[weights_pb2.WatchResponse]:
    """What a watcher is sent of a version; `data` in the place of its bytes."""
    step = weights_pb2.PathStep(version=number(parcel), encoding=parcel.header.encoding)
    push = weights_pb2.VersionPush(manifest=parcel.header.manifest, path=[step])
    sent = b"".join(parcel.parts) if data is None else data
    return [weights_pb2.WatchResponse(push=push), weights_pb2.WatchResponse(chunk=sent)]


def head(
    version: int,
    serial: int,
    *,
    key: SigningKey = KEY,
    job: JobRef = JOB,
    expires_in_s: float = 1000.0,
    name: str = "head",
) -> weights_pb2.WatchResponse:
    signed = sign_pointer(key, job, name, version, serial, time.time() + expires_in_s)
    return weights_pb2.WatchResponse(pointer=signed)


def number(parcel: Parcel) -> int:
    return weights_pb2.Manifest.FromString(parcel.header.manifest.manifest).version


class ScriptedStore(weights_pb2_grpc.WeightsServiceServicer):
    """Each Watch of head plays the next script, and the last one again and again."""

    def __init__(self) -> None:
        self.scripts: list[Script] = [[]]
        self.watched: list[list[int]] = []
        self.asked: list[tuple[int, list[int]]] = []
        self.keys = weights_pb2.GetKeysResponse(public_key=KEY.public_key)
        self._ways: dict[int, Callable[[list[int]], Parcel]] = {}
        self._blobs: dict[bytes, bytes] = {}
        self._server = RpcServer("127.0.0.1:0")
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(self, self._server.server)

    async def start(self) -> str:
        await self._server.start()
        return self._server.address

    async def stop(self) -> None:
        await self._server.drain(0)

    def hold(self, full: Parcel, *, delta: Parcel | None = None, spoiled: bytes | None = None) -> None:
        """Has a version: an anchor, and a delta for whoever holds anything, `spoiled` in the place of its bytes."""
        for parcel in (full, delta):
            if parcel is not None:
                self._blobs[parcel.header.encoding.sha256] = b"".join(parcel.parts)
                self._blobs[parcel.assets_sha256] = parcel.header.assets
        if delta is not None and spoiled is not None:
            self._blobs[delta.header.encoding.sha256] = spoiled
        self._ways[number(full)] = lambda have: delta if delta is not None and have else full

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[weights_pb2.WatchResponse]:
        if request.pointer not in ("", "head"):
            yield weights_pb2.WatchResponse()
        else:
            self.watched.append(list(request.have))
            for response in self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]:
                yield response
        await asyncio.Event().wait()

    async def GetKeys(self, request: Any, context: Any) -> weights_pb2.GetKeysResponse:
        return self.keys

    async def GetVersion(self, request: Any, context: Any) -> weights_pb2.GetVersionResponse:
        self.asked.append((request.version, list(request.have)))
        if request.version not in self._ways:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such version")
        parcel = self._ways[request.version](list(request.have))
        step = weights_pb2.PathStep(version=request.version, encoding=parcel.header.encoding)
        return weights_pb2.GetVersionResponse(manifest=parcel.header.manifest, path=[step])

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[weights_pb2.FetchResponse]:
        data = self._blobs.get(request.sha256, b"")
        if request.sha256 not in self._blobs:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such bytes")
        yield weights_pb2.FetchResponse(total_size=len(data))
        yield weights_pb2.FetchResponse(chunk=data[request.offset :])
