"""The store's own host copies: from memory, or decoded again from what lies in the object store."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence

import structlog

from longshore.errors import IntegrityError, NotFound
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store import layout, metrics
from longshore.weight_store.books import Books
from longshore.weight_store.copies import Copies, HostCopy, total_bytes
from longshore.weight_store.decoding import CODECS, walk
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import Objects
from longshore.weight_store.payload import TensorInfo
from longshore.weight_store.planner import Step, cheapest_path
from longshore.weight_store.records import Records
from longshore.weight_store.version import tensor_infos

CopyKey = tuple[JobRef, VersionKey]

log = structlog.get_logger()


class HostCopies:
    """Versions' tensors by job and version."""

    def __init__(self, objects: Objects, books: Books, copies: Copies[CopyKey], threads: int) -> None:
        self._objects = objects
        self._records = Records(objects)
        self._books = books
        self._copies = copies
        self._threads = threads

    @property
    def max_bytes(self) -> int:
        return self._copies.max_bytes

    def put(self, job: JobRef, key: VersionKey, copy: HostCopy) -> None:
        """Holds a copy that was proven otherwise."""
        self._copies.put((job, key), copy)
        metrics.HOST_COPY_BYTES.set(self._copies.num_bytes)

    def discard(self, job: JobRef, key: VersionKey) -> None:
        self._copies.discard((job, key))
        metrics.HOST_COPY_BYTES.set(self._copies.num_bytes)

    def discard_unused(self, idle_s: float) -> None:
        """Lets the copies go that nothing was decoded against for so long: their job may have ended."""
        self._copies.discard_unused(time.monotonic() - idle_s)
        metrics.HOST_COPY_BYTES.set(self._copies.num_bytes)

    def held(self, job: JobRef, weight_set: int) -> set[int]:
        """Versions of a weight set whose copies are in memory."""
        held = self._copies.keys()
        return {key.version for owner, key in held if (owner, key.weight_set) == (job, weight_set)}

    def get(self, job: JobRef, key: VersionKey) -> HostCopy:
        """The version's tensors, proven; decoded by the cheapest path from what is held, or from an anchor.

        Raises:
            NotFound: there is no such version, no sound way to it, or it is too large to be held.
        """
        copy = self._copies.get((job, key))
        if copy is not None:
            return copy
        infos = tensor_infos(self._records.manifest(job, key))
        if total_bytes(infos) > self._copies.max_bytes:
            raise NotFound(
                f"version {key.version} of {job} has {total_bytes(infos)} bytes, more than host copies may have "
                f"({self._copies.max_bytes}): raise LONGSHORE_HOST_COPIES_MB, or publish full encodings"
            )
        with_held = True
        while True:
            held = self.held(job, key.weight_set) if with_held else set()
            steps = cheapest_path(self._books.catalog(job).encodings(key.weight_set), held, key.version, CODECS)
            if steps is None:
                raise NotFound(f"{job} has no sound way to the tensors of version {key.version}")
            try:
                copy = self._walked(job, key, steps, infos)
            except (IntegrityError, NotFound) as error:
                # A damaged encoding is no longer offered. Where none is, a copy in memory must be at fault.
                if not self._set_aside_damaged(job, key.weight_set, steps, error):
                    if not with_held:
                        raise NotFound(f"version {key.version} of {job} cannot be decoded: {error}") from None
                    with_held = False
                continue
            self.put(job, key, copy)
            return copy

    def _walked(self, job: JobRef, key: VersionKey, steps: Sequence[Step], infos: Sequence[TensorInfo]) -> HostCopy:
        start = None
        if not steps:
            raise NotFound(f"the copy of version {key.version} went while it was asked for")
        if steps[0].encoding.HasField("base_version"):
            start = self._copies.get((job, VersionKey(key.weight_set, steps[0].encoding.base_version)))
            if start is None:
                raise NotFound(f"the copy of version {steps[0].encoding.base_version} went while it was asked for")
        return walk(steps, lambda encoding: self._read(job, encoding), start, infos, self._threads)

    def _read(self, job: JobRef, encoding: weights_pb2.Encoding) -> bytes:
        return self._objects.get(layout.blob_path(job, encoding.sha256))

    def _set_aside_damaged(self, job: JobRef, weight_set: int, steps: Sequence[Step], reason: Exception) -> bool:
        """Takes encodings whose bytes are gone or wrong out of the store. True when there were any."""
        damaged = []
        for step in steps:
            data = None
            with contextlib.suppress(NotFound):
                data = self._read(job, step.encoding)
            if data is None or hashlib.sha256(data).digest() != step.encoding.sha256:
                damaged.append(layout.encoding_path(job, VersionKey(weight_set, step.version), step.encoding.sha256))
        if damaged:
            with self._books.changing(job) as catalog:
                for path in damaged:
                    log.warning("a damaged encoding is set aside", job=str(job), path=path, reason=str(reason))
                    self._objects.delete(path)
                    metrics.DAMAGED_ENCODINGS.labels(job.project, job.job).inc()
                catalog.forget(job, damaged)
        return bool(damaged)
