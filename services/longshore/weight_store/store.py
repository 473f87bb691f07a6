"""The versioned weight store: which publishes and pointers are accepted, and in what order their parts are written.

Blocking and safe to call from several threads; one process at a time may write to a store. Knows nothing of gRPC. A
version exists from the moment its manifest does; everything it is made of is written before, so that a crash at any
point leaves either the version or leftovers that retention removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from longshore import signing
from longshore.errors import Conflict, Fenced, IntegrityError, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.rpc import convert
from longshore.types import JobRef
from longshore.weight_store import layout, payload, retention
from longshore.weight_store.hub import State
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import Objects
from longshore.weight_store.records import Records
from longshore.weight_store.version import (
    HEAD,
    PointerState,
    open_manifest,
    open_pointer,
    parse_manifest,
    pointer_state,
    tensor_infos,
)

POLICY = weights_pb2.WEIGHT_SET_POLICY


class VersionTaken(Conflict):
    """Another manifest holds the version's number."""


@dataclass(frozen=True)
class Admission:
    """A publish whose header was found good; its payload is still to come."""

    job: JobRef
    key: VersionKey
    manifest: weights_pb2.Manifest
    # Without the assets: this becomes the version's `manifest` object.
    record: weights_pb2.PublishHeader
    assets: bytes
    head: PointerState | None

    @property
    def encoding(self) -> weights_pb2.Encoding:
        return self.record.encoding


class WeightStore:
    """Versions, pointers and keys of every job in one object store."""

    def __init__(self, objects: Objects, clock: Callable[[], float] = time.time) -> None:
        self._objects = objects
        self._records = Records(objects)
        self._clock = clock
        self._locks: weakref.WeakValueDictionary[JobRef, threading.Lock] = weakref.WeakValueDictionary()
        self._locks_guard = threading.Lock()
        # Jobs whose head was compared with their newest version since this process began.
        self._repaired: set[JobRef] = set()

    def register_key(self, job: JobRef, public_key: bytes, keep: int) -> None:
        """Names the job's key and retention; the same key again updates `keep`. Raises Conflict, Rejected."""
        if len(public_key) != signing.PUBLIC_KEY_BYTES or keep < 1:
            raise Rejected("malformed", "a key has 32 bytes, and at least one version is kept")
        path = layout.key_path(job, signing.key_id(public_key))
        with self._lock(job):
            known = [item.path for item in self._objects.list(layout.keys_prefix(job))]
            if known and known != [path]:
                raise Conflict(f"{job} has another key; a job's key cannot be changed")
            # The key comes last: a registered job always says how many versions it keeps.
            self._objects.put(layout.keep_path(job), str(keep).encode())
            self._objects.put(path, public_key)

    def admit(self, header: weights_pb2.PublishHeader) -> Admission:
        """Judges a publish by its header, before its payload is received.

        Raises:
            Fenced: a newer learner epoch has published, or head is past this publish's serial.
            VersionTaken: another manifest holds the number.
            IntegrityError: a signature or checksum does not match, or the key is not the job's.
            Rejected: the header makes no sense.
        """
        signed = header.manifest
        job = convert.job_from_proto(parse_manifest(signed.manifest).job)
        manifest = open_manifest(self._records.public_key(job, signed.key_id), signed, job)
        key = VersionKey(manifest.weight_set, manifest.version)
        _check_encoding(header.encoding, manifest)
        self._check_assets(job, manifest, header.assets)
        head = self._opened(header.head) if header.HasField("head") else None
        if head is not None and (head.job, head.name, VersionKey(POLICY, head.version)) != (job, HEAD, key):
            raise Rejected("head", "the pointer that comes with a version must be head, and name it")
        record = weights_pb2.PublishHeader(manifest=signed, encoding=header.encoding)
        if head is not None:
            record.head.CopyFrom(header.head)
        admission = Admission(job, key, manifest, record, header.assets, head)
        self._repair_head(job)
        self._is_there(admission)
        return admission

    def commit(self, admission: Admission, file: IO[bytes]) -> bool:
        """Checks the payload and makes the version exist, with head on it. True when the version was there already.

        Raises:
            IntegrityError: the payload is not what the manifest says.
            Fenced, VersionTaken: as `admit`, for what happened since.
        """
        if (size := file.seek(0, os.SEEK_END)) != admission.encoding.size:
            raise IntegrityError(f"the payload has {size} bytes, its encoding says {admission.encoding.size}")
        payload.check(file, admission.encoding.sha256, tensor_infos(admission.manifest))
        with self._lock(admission.job):
            existed = self._is_there(admission)
            self._write_parts(admission, file, existed)
            if not existed:
                path = layout.manifest_path(admission.job, admission.key)
                self._objects.create(path, admission.record.SerializeToString())
            if admission.head is not None:
                self._advance(admission.head, admission.record.head)
        return existed

    def version(self, job: JobRef, key: VersionKey) -> tuple[weights_pb2.SignedManifest, list[weights_pb2.Encoding]]:
        """The signed manifest and what can be fetched. Raises NotFound."""
        return self._records.version(job, key).manifest, self._records.encodings(job, key)

    def versions(self, job: JobRef, weight_set: int, before: int | None, limit: int) -> list[int]:
        """Numbers on hand below `before`, newest first."""
        numbers = self._records.numbers(job, weight_set)
        return [number for number in numbers if before is None or number < before][:limit]

    def pointer(self, job: JobRef, name: str) -> State:
        """Where a pointer stands; None while there is none."""
        self._repair_head(job)
        return self._records.pointer(job, name)

    def set_pointer(self, signed: weights_pb2.SignedPointer) -> PointerState:
        """Moves a pointer and returns what it says; the very same pointer again changes nothing.

        Raises:
            Conflict: the serial does not grow.
            NotFound: there is no such version.
            IntegrityError, Rejected: the pointer is not the job's, has expired, or makes no sense.
        """
        state = self._opened(signed)
        self._repair_head(state.job)
        with self._lock(state.job):
            self._records.version(state.job, VersionKey(POLICY, state.version))
            present = self._records.pointer(state.job, state.name)
            if present and present[0].serial >= state.serial and present[1].pointer != signed.pointer:
                raise Conflict(
                    f"{state.name} of {state.job} has serial {present[0].serial}; {state.serial} is not above it"
                )
            self._advance(state, signed)
        return state

    def find(self, job: JobRef, sha256: bytes) -> tuple[str, int]:
        """Path and size of an encoding's or asset bundle's bytes. Raises NotFound."""
        for path in (layout.blob_path(job, sha256), layout.assets_path(job, sha256)):
            with contextlib.suppress(NotFound):
                return path, self._objects.size(path)
        raise NotFound(f"{job} has no object {sha256.hex()}")

    def read(self, path: str, start: int, length: int) -> bytes:
        """Bytes of an object that `find` found. Raises NotFound when retention has removed it since."""
        return self._objects.read(path, start, length)

    def collect(self, job: JobRef) -> int:
        """Applies the job's retention and returns the number of objects removed."""
        root = layout.job_prefix(job)
        with self._lock(job):
            now = self._clock()
            # Head and serving hold their versions always, other names until they expire.
            named = {
                VersionKey(POLICY, state.version)
                for state in self._records.pointers(job)
                if state.name in (HEAD, "serving") or state.expires_at > now
            }
            listing = self._objects.list(root)
            gone = retention.removable(job, listing, self._records.keep(job), named, now, self._assets_of(job))
            for path in gone:
                self._objects.delete(path)
            self._objects.sweep_staged(root, now - retention.GRACE_S)
        return len(gone)

    def _is_there(self, admission: Admission) -> bool:
        """Whether this very manifest is published. Raises Fenced, VersionTaken."""
        job, key, head = admission.job, admission.key, admission.head
        present = self._records.pointer(job, HEAD)
        self._check_epoch(admission, present)
        try:
            stored = self._records.version(job, key).manifest.manifest
        except NotFound:
            if present and head and head.serial <= present[0].serial:
                raise Fenced(f"head of {job} has serial {present[0].serial}; {head.serial} is not above it") from None
            return False
        if stored != admission.record.manifest.manifest:
            raise VersionTaken(f"another manifest holds version {key.version} of {job}")
        return True

    def _check_epoch(self, admission: Admission, head: State) -> None:
        job, weight_set = admission.job, admission.key.weight_set
        rivals = {VersionKey(weight_set, number) for number in self._records.numbers(job, weight_set)[:1]}
        if head is not None:
            rivals.add(VersionKey(POLICY, head[0].version))
        epoch = admission.manifest.lineage.learner_epoch
        newest = max((self._records.manifest(job, rival).lineage.learner_epoch for rival in rivals), default=epoch)
        if newest > epoch:
            raise Fenced(f"learner epoch {epoch} of {job} was superseded by epoch {newest}")

    def _check_assets(self, job: JobRef, manifest: weights_pb2.Manifest, assets: bytes) -> None:
        if assets:
            if hashlib.sha256(assets).digest() != manifest.assets_sha256:
                raise IntegrityError("the asset bundle does not match its SHA-256 in the manifest")
            return
        try:
            self._objects.size(layout.assets_path(job, manifest.assets_sha256))
        except NotFound:
            raise Rejected("assets", "the store has not seen this version's asset bundle: send it along") from None

    def _write_parts(self, admission: Admission, file: IO[bytes], existed: bool) -> None:
        job, key, encoding = admission.job, admission.key, admission.encoding
        file.seek(0)
        # Written even if it is there: publishing again is how a damaged blob is mended.
        self._objects.put(layout.blob_path(job, encoding.sha256), file)
        if admission.assets:
            self._objects.put(layout.assets_path(job, admission.manifest.assets_sha256), admission.assets)
        own = layout.encoding_path(job, key, encoding.sha256)
        if not existed:
            # Left by a publish of other weights under this number that was cut off.
            for item in self._objects.list(layout.encodings_prefix(job, key)):
                if item.path != own:
                    self._objects.delete(item.path)
        self._objects.put(own, encoding.SerializeToString())

    def _repair_head(self, job: JobRef) -> None:
        """Finishes what a crash between a manifest and its head left undone."""
        if job in self._repaired:
            return
        with self._lock(job):
            for number in self._records.numbers(job, POLICY)[:1]:
                record = self._records.version(job, VersionKey(POLICY, number))
                if record.HasField("head"):
                    self._advance(pointer_state(record.head), record.head)
                self._repaired.add(job)

    def _advance(self, state: PointerState, signed: weights_pb2.SignedPointer) -> None:
        """Writes a pointer if its serial grows. The caller holds the job's lock."""
        present = self._records.pointer(state.job, state.name)
        if present is None or present[0].serial < state.serial:
            self._objects.put(layout.pointer_path(state.job, state.name), signed.SerializeToString())

    def _opened(self, signed: weights_pb2.SignedPointer) -> PointerState:
        """A pointer from outside, checked."""
        job = pointer_state(signed).job
        state = open_pointer(self._records.public_key(job, signed.key_id), signed, job)
        layout.pointer_path(job, state.name)
        if state.expires_at <= self._clock():
            raise Rejected("expired", f"the pointer {state.name} is past its expiry")
        return state

    def _assets_of(self, job: JobRef) -> Callable[[VersionKey], str]:
        return lambda key: self._records.manifest(job, key).assets_sha256.hex()

    def _lock(self, job: JobRef) -> threading.Lock:
        with self._locks_guard:
            return self._locks.setdefault(job, threading.Lock())


def _check_encoding(encoding: weights_pb2.Encoding, manifest: weights_pb2.Manifest) -> None:
    if encoding.kind != weights_pb2.ENCODING_KIND_FULL or encoding.codec != payload.CODEC:
        raise Rejected("encoding", f"a version is published as a full {payload.CODEC} encoding")
    if len(encoding.sha256) != 32 or encoding.size > payload.max_payload_bytes(tensor_infos(manifest)):
        raise Rejected("encoding", "the encoding's SHA-256 or size cannot be right")
