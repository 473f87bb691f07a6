"""A home and a site for the relay's mirror, by hand: no store, no wire. What they say is what a test lets them say."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence

from longshore.errors import IntegrityError, LongshoreError, NotFound, Unavailable
from longshore.proto.v1 import job_pb2, weights_pb2
from longshore.relay.inflow import Inflow
from longshore.weight_store.version import pointer_state

KEY = "known"


def signed(version: int, mark: str = "", key_id: str = KEY) -> weights_pb2.SignedManifest:
    """A manifest; `mark` tells manifests of one number apart."""
    manifest = weights_pb2.Manifest(version=version, layout_sha256=mark.encode())
    return weights_pb2.SignedManifest(manifest=manifest.SerializeToString(), key_id=key_id)


def pointer(version: int, serial: int = 1, name: str = "head", key_id: str = KEY) -> weights_pb2.WatchResponse:
    job = job_pb2.JobRef(project="p", job="j")
    data = weights_pb2.Pointer(job=job, name=name, version=version, serial=serial).SerializeToString()
    return weights_pb2.WatchResponse(pointer=weights_pb2.SignedPointer(pointer=data, key_id=key_id))


def step(version: int, data: bytes, base: int | None = None) -> weights_pb2.PathStep:
    encoding = weights_pb2.Encoding(sha256=hashlib.sha256(data).digest(), size=len(data), base_version=base)
    return weights_pb2.PathStep(version=version, encoding=encoding)


def push(manifest: weights_pb2.SignedManifest, *path: weights_pb2.PathStep) -> weights_pb2.WatchResponse:
    return weights_pb2.WatchResponse(push=weights_pb2.VersionPush(manifest=manifest, path=path))


def chunk(data: bytes) -> weights_pb2.WatchResponse:
    return weights_pb2.WatchResponse(chunk=data)


BROKEN = weights_pb2.WatchResponse(push_broken=True)


class FakeHome:
    """Streams are fed by `say`; versions and bytes are what `put` gave it."""

    def __init__(self) -> None:
        self.away = False
        # By pointer: what each stream since the start was told of `have`.
        self.streams: dict[str, list[list[int] | None]] = {}
        self.paths: dict[int, Callable[[Sequence[int]], weights_pb2.GetVersionResponse]] = {}
        self.blobs: dict[bytes, bytes] = {}
        # SHA-256's first bytes and offset of each fetch.
        self.fetched: list[tuple[bytes, int]] = []
        # Bytes after which the next fetch breaks off.
        self.breaks_after: int | None = None
        self.keys_told = weights_pb2.GetKeysResponse(public_key=b"first")
        self.keys_asked = 0
        self._said: dict[str, asyncio.Queue[weights_pb2.WatchResponse | LongshoreError]] = {}

    def say(self, *said: weights_pb2.WatchResponse | LongshoreError, pointer: str = "head") -> None:
        for item in said:
            self._queue(pointer).put_nowait(item)

    def put(self, manifest: weights_pb2.SignedManifest, *datas: bytes) -> list[weights_pb2.PathStep]:
        """Has a version with one path, whatever the caller has; several datas are deltas from the version before."""
        version = weights_pb2.Manifest.FromString(manifest.manifest).version
        bases: list[int | None] = [None] if len(datas) == 1 else list(range(version - len(datas), version))
        path = [
            step(version - len(datas) + 1 + place, data, base)
            for place, (data, base) in enumerate(zip(datas, bases, strict=True))
        ]
        self.paths[version] = lambda have: weights_pb2.GetVersionResponse(manifest=manifest, path=path)
        for data in datas:
            self.blobs[hashlib.sha256(data).digest()] = data
        return path

    @contextlib.asynccontextmanager
    async def watch(
        self, pointer: str, have: Sequence[int] | None
    ) -> AsyncIterator[AsyncIterator[weights_pb2.WatchResponse]]:
        self._reach()
        self.streams.setdefault(pointer, []).append(None if have is None else list(have))
        yield self._stream(pointer)

    async def version(self, version: int, have: Sequence[int]) -> weights_pb2.GetVersionResponse:
        self._reach()
        if version not in self.paths:
            raise NotFound(f"no version {version}")
        return self.paths[version](have)

    async def fetch(self, sha256: bytes, offset: int) -> AsyncIterator[bytes]:
        self._reach()
        self.fetched.append((sha256[:4], offset))
        if sha256 not in self.blobs:
            raise NotFound("no such bytes")
        data, sent = self.blobs[sha256][offset:], 0
        while data:
            if self.breaks_after is not None and sent >= self.breaks_after:
                self.breaks_after = None
                raise Unavailable("the link broke")
            yield data[:4]
            sent, data = sent + 4, data[4:]

    async def assets(self, sha256: bytes) -> bytes:
        self._reach()
        return b"assets of " + sha256

    async def keys(self) -> weights_pb2.GetKeysResponse:
        self._reach()
        self.keys_asked += 1
        return self.keys_told

    async def _stream(self, pointer: str) -> AsyncIterator[weights_pb2.WatchResponse]:
        while True:
            item = await self._queue(pointer).get()
            if isinstance(item, LongshoreError):
                raise item
            yield item

    def _queue(self, pointer: str) -> asyncio.Queue[weights_pb2.WatchResponse | LongshoreError]:
        return self._said.setdefault(pointer, asyncio.Queue())

    def _reach(self) -> None:
        if self.away:
            raise Unavailable("home is away")


class FakeSite:
    """Takes everything, unless told otherwise; what it has taken is in `held`, by version."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[weights_pb2.SignedManifest, bytes]] = {}
        self.rebuilt: list[int] = []
        self.ahead: list[tuple[int, bool]] = []
        self.assets: dict[int, bytes] = {}
        self.lacks: bytes | None = None
        self.pointers: dict[str, int] = {}
        self.received: dict[int, bytes] = {}
        # Raised by takes, before they read anything.
        self.refusals: list[LongshoreError] = []
        self.known = {KEY}
        self.point_error: LongshoreError | None = None

    async def versions(self) -> list[int]:
        return sorted(self.held, reverse=True)

    def knows(self, key_id: str) -> bool:
        return key_id in self.known

    def version_of(self, signed: weights_pb2.SignedManifest, path: Sequence[weights_pb2.PathStep]) -> int:
        self._believe(signed.key_id)
        return weights_pb2.Manifest.FromString(signed.manifest).version

    def pointed(self, signed: weights_pb2.SignedPointer) -> int:
        self._believe(signed.key_id)
        return pointer_state(signed).version

    async def lacks_assets(self, manifest: weights_pb2.SignedManifest) -> bytes | None:
        return self.lacks

    async def take(self, header: weights_pb2.PublishHeader, inflow: Inflow, *, heads: bool) -> None:
        version = weights_pb2.Manifest.FromString(header.manifest.manifest).version
        self.ahead.append((version, heads))
        if self.refusals:
            raise self.refusals.pop(0)
        self.received[version] = b""
        async for part in inflow.chunks():
            self.received[version] += part
        if hashlib.sha256(self.received[version]).digest() != header.encoding.sha256:
            raise IntegrityError("other bytes than the encoding says")
        await inflow.confirmed()
        self.held[version] = (header.manifest, self.received[version])
        self.assets[version] = header.assets

    async def rebuild(
        self, version: weights_pb2.GetVersionResponse, payloads: Sequence[bytes], assets: bytes, *, heads: bool
    ) -> None:
        number = version.path[-1].version
        for item, data in zip(version.path, payloads, strict=True):
            if hashlib.sha256(data).digest() != item.encoding.sha256:
                raise IntegrityError("other bytes than the encoding says")
        self.rebuilt.append(number)
        self.held[number] = (version.manifest, b"".join(payloads))

    async def point(self, signed: weights_pb2.SignedPointer) -> None:
        if self.point_error is not None:
            error, self.point_error = self.point_error, None
            raise error
        state = pointer_state(signed)
        assert state.version in self.held, "a pointer to what the site does not have"
        self.pointers[state.name] = state.version

    async def adopt_keys(self, keys: weights_pb2.GetKeysResponse) -> None:
        self.known |= {rotation.key_id for rotation in keys.rotations}

    def _believe(self, key_id: str) -> None:
        if key_id not in self.known:
            raise IntegrityError(f"key {key_id} is not known")
