"""What one Watch stream sends: pointer moves, and with `push` each version's bytes before anybody asks for them.

A receiver may rely on the order: a version's manifest, its bytes, then the pointer that names it. Knows no wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from longshore.errors import NotFound, Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.decoding import SAFETENSORS, is_adapter
from longshore.weight_store.hub import PointerHub, State
from longshore.weight_store.incoming import CHUNK_BYTES, SENT_CHUNK_BYTES, Incoming
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.planner import Step, legs
from longshore.weight_store.store import POLICY, WeightStore

# One read of the store gives several chunks, because each is a request where the store is remote.
READ_BYTES = 4 * CHUNK_BYTES
# A receiver keeps few versions; more would only make the search for a path longer.
MAX_HELD = 64


@dataclass(frozen=True)
class Wanted:
    """What a watcher who wants versions pushed can use."""

    have: tuple[int, ...]
    codecs: tuple[str, ...]


class Pushes:
    """One watcher of one pointer, and the versions that it holds by now."""

    def __init__(self, store: WeightStore, hub: PointerHub, job: JobRef, name: str, wanted: Wanted | None) -> None:
        """
        Args:
            wanted: None sends pointers alone.
        """
        self._store = store
        self._hub = hub
        self._job = job
        self._name = name
        self._pushes = wanted is not None
        # Oldest first, so that the newest stay.
        self._held = sorted(wanted.have if wanted else ())[-MAX_HELD:]
        self._codecs = {SAFETENSORS, *(wanted.codecs if wanted else ())}

    async def responses(self) -> AsyncGenerator[weights_pb2.WatchResponse, None]:
        """Everything that the watcher is sent, until the hub closes."""
        async with contextlib.aclosing(self._hub.watch(self._job, self._name, self._read)) as news:
            async for item in news:
                if isinstance(item, Incoming):
                    if self._can_use(item):
                        async for response in self._cut_through(item):
                            yield response
                    continue
                if self._pushes and item is not None and item[0].version not in self._held:
                    async for response in self._stored(item[0].version):
                        yield response
                yield weights_pb2.WatchResponse(pointer=item[1] if item else None)

    async def _read(self) -> State:
        return await asyncio.to_thread(self._store.pointer, self._job, self._name)

    def _can_use(self, incoming: Incoming) -> bool:
        encoding = incoming.encoding
        if not self._pushes or encoding.codec not in self._codecs or incoming.version in self._held:
            return False
        return not encoding.HasField("base_version") or encoding.base_version in self._held

    async def _cut_through(self, incoming: Incoming) -> AsyncIterator[weights_pb2.WatchResponse]:
        step = weights_pb2.PathStep(version=incoming.version, encoding=incoming.encoding)
        # Opened first: a watcher that is slow to take the manifest may find the publish at its end.
        with incoming.reading() as chunks:
            yield weights_pb2.WatchResponse(push=weights_pb2.VersionPush(manifest=incoming.manifest, path=[step]))
            try:
                async for chunk in chunks:
                    yield weights_pb2.WatchResponse(chunk=chunk)
            except Unavailable:
                yield weights_pb2.WatchResponse(push_broken=True)
                return
        # Before anything else is sent: what was pushed and then not published has to be taken back.
        if await incoming.settled():
            self._hold(incoming.version, _adapted(incoming.encoding))
        else:
            yield weights_pb2.WatchResponse(push_broken=True)

    async def _stored(self, version: int) -> AsyncIterator[weights_pb2.WatchResponse]:
        """A version on hand by its cheapest path; an adapter's base goes before it, as a version of its own.

        Where there is no way nothing is sent: who asks for it will be told.
        """
        key = VersionKey(POLICY, version)
        path = await asyncio.to_thread(self._store.path, self._job, key, self._held, self._codecs)
        for leg in legs(path or ()):
            try:
                end = VersionKey(POLICY, leg[-1].version)
                manifest, _ = await asyncio.to_thread(self._store.version, self._job, end)
            except NotFound:
                return
            yield weights_pb2.WatchResponse(push=weights_pb2.VersionPush(manifest=manifest, path=path_to_proto(leg)))
            try:
                for step in leg:
                    path_of, size = await asyncio.to_thread(self._store.find, self._job, step.encoding.sha256)
                    async for chunk in stored_chunks(self._store, path_of, size, 0):
                        yield weights_pb2.WatchResponse(chunk=chunk)
            except NotFound:
                # Retention was quicker.
                yield weights_pb2.WatchResponse(push_broken=True)
                return
            self._hold(end.version, _adapted(leg[-1].encoding))

    def _hold(self, version: int, adapted: int | None = None) -> None:
        """
        Args:
            adapted: what it came as an adapter of; the next one will too, so it is not forgotten before the version.
        """
        if adapted in self._held:
            self._held.remove(adapted)
            self._held.append(adapted)
        self._held.append(version)
        del self._held[:-MAX_HELD]


def _adapted(encoding: weights_pb2.Encoding) -> int | None:
    """The base of an adapter."""
    return encoding.base_version if is_adapter(encoding) else None


async def stored_chunks(store: WeightStore, path: str, size: int, offset: int) -> AsyncIterator[bytes]:
    """Bytes of an object that `store.find` found, from `offset`, in chunks. Raises NotFound when it has gone since."""
    position = offset
    while position < size:
        block = await asyncio.to_thread(store.read, path, position, READ_BYTES)
        for start in range(0, len(block), SENT_CHUNK_BYTES):
            yield block[start : start + SENT_CHUNK_BYTES]
        position += len(block)


def path_to_proto(path: Sequence[Step]) -> list[weights_pb2.PathStep]:
    """The wire's form of a path."""
    return [weights_pb2.PathStep(version=step.version, encoding=step.encoding) for step in path]
