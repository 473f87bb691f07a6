"""What a store does beside serving: encodings that make its versions cheaper to reach, and removal of leftovers.

One thread of low priority, woken by each publish. Of the newest version of a job it makes
- a full encoding, once the deltas since the last one add up to half of it: for newcomers;
- the delta from the version before, where it was not published as one: for who keeps up;
- the delta from 8 and from 64 versions before, if it is smaller than the deltas between: for who is behind.
A version that came as an adapter needs no deltas: whoever has the base is one small encoding away from any version.
Each is accepted like any other encoding: only if it decodes to what the manifest says. A version that is superseded
while the thread is busy is passed over, so that a fast publisher is never followed by a backlog.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence

import structlog

from longshore.errors import IntegrityError, LongshoreError, NotFound, Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store import metrics
from longshore.weight_store.copies import total_bytes
from longshore.weight_store.decoding import CODECS, DELTA, PLANES, is_adapter
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StorageFull
from longshore.weight_store.payload import TensorInfo
from longshore.weight_store.planner import Step, path_bytes
from longshore.weight_store.store import WeightStore

# Versions from a delta's base to its result.
STRIDES = (1, 8, 64)
# Versions that pass before merging is tried again where a delta was not smaller than what there is.
_PAUSE = 8
# The newest version's tensors, an older one's, and what is decoded on the way between two.
_COPIES_TO_MERGE = 3
# Deltas since the last full encoding, as a share of it, that a newcomer is spared by a new one.
_ANCHOR_SHARE = 0.5
_NICENESS = 10
_WAIT_S = 60.0
# Longer than a train step takes. After it a copy is decoded again from what is stored.
_COPY_IDLE_S = 6 * 3600.0

_NAMES: dict[int, str] = {
    weights_pb2.ENCODING_KIND_FULL: "full",
    weights_pb2.ENCODING_KIND_DELTA: "delta",
    weights_pb2.ENCODING_KIND_MERGED_DELTA: "merged",
}

Work = tuple[JobRef, int]

log = structlog.get_logger()


class Upkeep:
    """The background work of one store. `run` belongs to a thread of its own; `wake` and `stop` to any."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        # Jobs and weight sets that were published to, in that order.
        self._waiting: dict[Work, None] = {}
        self._stopped = False
        # The version from which on merging is worth another try, where the last merged delta was not smaller.
        self._again: dict[tuple[Work, int], int] = {}

    def wake(self, job: JobRef, key: VersionKey) -> None:
        """Says that a version was published."""
        with self._changed:
            self._waiting[(job, key.weight_set)] = None
            self._changed.notify()

    def stop(self) -> None:
        """Ends `run` after what it is doing; a process may also just end."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Works until `stop`. Only a mistake in the program raises."""
        # Of this thread alone; not every system has that.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        self._sweep()
        while (work := self._next()) is not None:
            began = time.monotonic()
            self.work(*work)
            # Half of the time at most, so that a learner on the same machine keeps its processors.
            self._rest(time.monotonic() - began)

    def work(self, job: JobRef, weight_set: int) -> None:
        """Makes what the newest version of a weight set lacks. What fails is counted, logged, and tried again later."""
        newest = self._store.newest(job, weight_set)
        if newest is None:
            return
        key = VersionKey(weight_set, newest)
        with self._counted(job, "full"):
            self._anchor(job, key)
        for stride in STRIDES if not self._bases(job, key) else ():
            with self._counted(job, "delta" if stride == 1 else "merged"):
                self._merge(job, key, stride)
        self._let_go(job, key)

    def _next(self) -> Work | None:
        with self._changed:
            while not self._stopped:
                if self._waiting:
                    work = next(iter(self._waiting))
                    del self._waiting[work]
                    return work
                self._changed.wait(_WAIT_S)
                self._store.copies.discard_unused(_COPY_IDLE_S)
            return None

    def _rest(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, min(seconds, _WAIT_S))

    def _sweep(self) -> None:
        """Removes what earlier lives of the process left behind."""
        try:
            jobs = self._store.jobs()
        except Unavailable as error:
            metrics.RETENTION_FAILURES.inc()
            log.warning("leftovers were not looked for", reason=str(error))
            return
        for job in jobs:
            if self._stopped:
                return
            try:
                removed = self._store.collect(job)
            except LongshoreError as error:
                metrics.RETENTION_FAILURES.inc()
                log.warning("retention failed", job=str(job), reason=str(error))
                continue
            metrics.REMOVED_OBJECTS.labels(job.project, job.job).inc(removed)

    def _anchor(self, job: JobRef, key: VersionKey) -> None:
        steps = self._store.path(job, key, (), CODECS)
        if steps is not None and path_bytes(steps[1:]) <= _ANCHOR_SHARE * steps[0].encoding.size:
            return
        # Late, because it needs NumPy.
        from longshore.weight_store.codec import planes

        data = planes.encode(self._store.copies.get(job, key).tensors)
        self._add(job, key, data, PLANES, weights_pb2.ENCODING_KIND_FULL, None)

    def _merge(self, job: JobRef, key: VersionKey, stride: int) -> None:
        base = VersionKey(key.weight_set, key.version - stride)
        attempt = ((job, key.weight_set), stride)
        kind = weights_pb2.ENCODING_KIND_DELTA if stride == 1 else weights_pb2.ENCODING_KIND_MERGED_DELTA
        if key.version < self._again.get(attempt, 0):
            return
        rival = self._store.path(job, key, {base.version}, CODECS)
        if rival is None or _is_direct(rival, base.version) or not self._store.has(job, base):
            return
        new = self._store.copies.get(job, key)
        if _COPIES_TO_MERGE * total_bytes(new.infos) > self._store.copies.max_bytes:
            metrics.BACKGROUND_ENCODINGS.labels(job.project, job.job, _NAMES[kind], "no_memory").inc()
            return
        old = self._store.copies.get(job, base)
        if not _same_layout(old.infos, new.infos):
            return
        from longshore.weight_store.codec import delta

        data = delta.encode(old.tensors, new.tensors)
        if len(data) >= path_bytes(rival):
            metrics.BACKGROUND_ENCODINGS.labels(job.project, job.job, _NAMES[kind], "not_smaller").inc()
            self._again[attempt] = key.version + max(stride, _PAUSE)
            return
        self._add(job, key, data, DELTA, kind, base.version)

    def _add(
        self,
        job: JobRef,
        key: VersionKey,
        data: bytes,
        codec: str,
        kind: weights_pb2.EncodingKind.ValueType,
        base: int | None,
    ) -> None:
        encoding = weights_pb2.Encoding(
            kind=kind, base_version=base, sha256=hashlib.sha256(data).digest(), size=len(data), codec=codec
        )
        if not self._store.add_encoding(job, key, encoding, data):
            return
        name = _NAMES[kind]
        metrics.BACKGROUND_ENCODINGS.labels(job.project, job.job, name, "made").inc()
        metrics.BACKGROUND_BYTES.labels(job.project, job.job, name).inc(len(data))
        log.info("encoding made", job=str(job), version=key.version, kind=name, base=base, size=len(data))

    def _let_go(self, job: JobRef, key: VersionKey) -> None:
        """Frees the copies that neither the next publish nor the next merging starts from."""
        useful = {key.version, *(key.version - stride for stride in STRIDES if stride > 1), *self._bases(job, key)}
        for version in self._store.copies.held(job, key.weight_set):
            if version < key.version and version not in useful:
                self._store.copies.discard(job, VersionKey(key.weight_set, version))

    def _bases(self, job: JobRef, key: VersionKey) -> set[int]:
        """What a version's adapters are decoded against; nothing for one that did not come so."""
        try:
            _, encodings = self._store.version(job, key)
        except NotFound:
            return set()
        return {encoding.base_version for encoding in encodings if is_adapter(encoding)}

    @contextlib.contextmanager
    def _counted(self, job: JobRef, kind: str) -> Iterator[None]:
        try:
            yield
        except LongshoreError as error:
            metrics.BACKGROUND_ENCODINGS.labels(job.project, job.job, kind, _reason(error)).inc()
            log.warning("an encoding was not made", job=str(job), kind=kind, reason=str(error))


def _is_direct(path: Sequence[Step], base: int) -> bool:
    """Whether the cheapest way from a base is one delta already."""
    if len(path) != 1:
        return not path
    encoding = path[0].encoding
    return encoding.HasField("base_version") and encoding.base_version == base


def _same_layout(old: Sequence[TensorInfo], new: Sequence[TensorInfo]) -> bool:
    return [(info.name, info.dtype, info.shape) for info in old] == [(i.name, i.dtype, i.shape) for i in new]


def _reason(error: LongshoreError) -> str:
    if isinstance(error, StorageFull):
        return "disk_full"
    if isinstance(error, NotFound):
        return "not_found"
    return "damaged" if isinstance(error, IntegrityError) else "unavailable"
