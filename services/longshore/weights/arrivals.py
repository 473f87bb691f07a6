"""Versions whose bytes were sent before they were asked for: put together, decoded and proven while they come.

What was pushed is not served for that: only a pointer says that it was published. One object serves one Watch stream;
when the stream ends, what no pointer has named is forgotten, because another learner may yet take its number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from longshore.errors import IntegrityError, LongshoreError, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.copies import Copies, HostCopy
from longshore.weight_store.decoding import is_adapter, walk
from longshore.weight_store.paths import base_of, checked_path
from longshore.weight_store.planner import Step
from longshore.weight_store.version import tensor_infos

# Versions that may be on their way at a time; the oldest is given up for a newer one.
MAX_PENDING = 3

Arrived = tuple[weights_pb2.Manifest, HostCopy]


@dataclass
class _Parcel:
    """A version whose bytes are coming."""

    manifest: weights_pb2.Manifest
    path: tuple[Step, ...]
    payloads: list[bytearray] = field(default_factory=list)

    def add(self, chunk: bytes) -> None:
        """Raises Rejected: more bytes than were announced."""
        rest = memoryview(chunk)
        while rest:
            if not self.payloads or len(self.payloads[-1]) == self.path[len(self.payloads) - 1].encoding.size:
                if len(self.payloads) == len(self.path):
                    raise Rejected("chunk", f"version {self.manifest.version}: more bytes than its path has")
                self.payloads.append(bytearray())
            room = self.path[len(self.payloads) - 1].encoding.size - len(self.payloads[-1])
            self.payloads[-1] += rest[:room]
            rest = rest[room:]

    @property
    def whole(self) -> bool:
        sizes = [step.encoding.size for step in self.path]
        return [len(data) for data in self.payloads] == sizes


class Arrivals:
    """Pushed versions by number."""

    def __init__(self, copies: Copies[int], on_fault: Callable[[int, LongshoreError], None]) -> None:
        """
        Args:
            on_fault: told of a version whose bytes gave something else than its manifest says.
        """
        self._copies = copies
        self._on_fault = on_fault
        self._coming: _Parcel | None = None
        self._pending: dict[int, asyncio.Task[Arrived]] = {}
        # Of those that came as adapters: what they are decoded against.
        self._bases: dict[int, int] = {}

    def begin(self, manifest: weights_pb2.Manifest, push: weights_pb2.VersionPush) -> None:
        """Takes a version's announcement. Raises Rejected: it cannot be what it says, or its base is not held."""
        path = checked_path(push.path, manifest.version, tensor_infos(manifest))
        base = base_of(path)
        if base is not None and not self._has(base):
            raise Rejected("base", f"version {manifest.version} was pushed against {base}, which is not held here")
        self._coming = _Parcel(manifest, path)

    def add(self, chunk: bytes) -> int | None:
        """Takes bytes of the version that was begun; its number once they are all there. Raises Rejected."""
        parcel = self._coming
        if parcel is None:
            raise Rejected("chunk", "bytes came that belong to no version")
        parcel.add(chunk)
        if not parcel.whole:
            return None
        self._coming = None
        version = parcel.manifest.version
        self._forget(version)
        base = base_of(parcel.path)
        if base is not None and is_adapter(parcel.path[-1].encoding):
            self._bases[version] = base
        task = asyncio.create_task(self._decode(parcel), name=f"decode {version}")
        task.add_done_callback(lambda done: self._finished(version, done))
        self._pending[version] = task
        for stale in list(self._pending)[:-MAX_PENDING]:
            self._forget(stale)
        return version

    def cut_short(self) -> int | None:
        """Gives up a version that was begun and is not whole, because something else has come; its number, or None."""
        parcel, self._coming = self._coming, None
        return None if parcel is None else parcel.manifest.version

    def broken(self) -> None:
        """The version that was sent last was not published, or its bytes will not all come."""
        if self._coming is None and self._pending:
            self._forget(next(reversed(self._pending)))
        self._coming = None

    async def get(self, version: int) -> Arrived | None:
        """A version that was pushed whole, proven; None when it was not. Raises IntegrityError."""
        task = self._pending.get(version)
        return None if task is None else await asyncio.shield(task)

    def confirm(self, version: int) -> None:
        """A pointer names the version: it, or the base of one that came as an adapter, is held from now on and may be
        decoded against in other streams."""
        for held in {version, self._bases.get(version, version)} & self._pending.keys():
            self._pending[held].add_done_callback(partial(self._hold, held))

    def close(self) -> None:
        """Ends what is being decoded."""
        for version in list(self._pending):
            self._forget(version)

    def _has(self, version: int) -> bool:
        return version in self._pending or self._copies.get(version) is not None

    def _forget(self, version: int) -> None:
        self._bases.pop(version, None)
        task = self._pending.pop(version, None)
        if task is not None:
            task.cancel()

    def _hold(self, version: int, task: asyncio.Task[Arrived]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._copies.put(version, task.result()[1])

    def _finished(self, version: int, task: asyncio.Task[Arrived]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            return
        # What was not decoded is not held, so that nothing is decoded against it.
        if self._pending.get(version) is task:
            del self._pending[version]
            self._bases.pop(version, None)
        if error is None:
            return
        if not isinstance(error, LongshoreError):
            raise error
        self._on_fault(version, error)

    async def _decode(self, parcel: _Parcel) -> Arrived:
        base = base_of(parcel.path)
        start = None if base is None else await self._base(base)
        payloads = {step.encoding.sha256: data for step, data in zip(parcel.path, parcel.payloads, strict=True)}
        read = lambda encoding: payloads[encoding.sha256]  # noqa: E731
        infos = tensor_infos(parcel.manifest)
        return parcel.manifest, await asyncio.to_thread(walk, parcel.path, read, start, infos)

    async def _base(self, version: int) -> HostCopy:
        held = self._copies.get(version)
        if held is not None:
            return held
        arrived = await self.get(version)
        if arrived is None:
            raise IntegrityError(f"the base, version {version}, is no longer held")
        return arrived[1]
