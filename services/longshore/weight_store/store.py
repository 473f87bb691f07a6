"""The versioned weight store: which publishes and encodings are accepted, and in what order their parts are written.

Blocking and safe to call from several threads; one process at a time may write to a store. Knows nothing of gRPC. A
version exists from the moment its manifest does; everything it is made of is written before, so that a crash at any
point leaves either the version or leftovers that retention removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Collection
from typing import IO

from longshore.errors import Conflict, Fenced, IntegrityError, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.rpc import convert
from longshore.types import JobRef
from longshore.weight_store import layout, payload, retention
from longshore.weight_store.admission import Admission
from longshore.weight_store.books import Books
from longshore.weight_store.copies import Copies, HostCopy, total_bytes
from longshore.weight_store.decoding import CODECS, SAFETENSORS, check_encoding, decode, is_adapter
from longshore.weight_store.host_copies import CopyKey, HostCopies
from longshore.weight_store.hub import State
from longshore.weight_store.keychain import find_key
from longshore.weight_store.keys import JobKeys
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import Objects
from longshore.weight_store.planner import Step, cheapest_path, reachable
from longshore.weight_store.pointers import POLICY, Pointers
from longshore.weight_store.records import Records
from longshore.weight_store.version import HEAD, PointerState, open_manifest, parse_manifest, tensor_infos

__all__ = ["POLICY", "Admission", "VersionTaken", "WeightStore"]

# Host copies held at a time, within their bytes: of each job the head's, and what merging starts from.
COPIES = 16
_COPY_BYTES = 8 * 1024**3


class VersionTaken(Conflict):
    """Another manifest holds the version's number."""


class WeightStore:
    """Versions, pointers and keys of every job in one object store.

    Args:
        copies: where host copies are held; its bound is the store's memory for tensors.
        mirror: the store holds copies of versions that an origin has accepted: signatures and results are checked as
            ever, but an older epoch or an older key of the job is no reason to refuse a version, and a head that is
            older than the present one is passed over.
        threads: for decoding.
    """

    def __init__(
        self,
        objects: Objects,
        clock: Callable[[], float] = time.time,
        *,
        copies: Copies[CopyKey] | None = None,
        mirror: bool = False,
        threads: int = 1,
    ) -> None:
        self._objects = objects
        self._records = Records(objects)
        self._clock = clock
        self._mirror = mirror
        self._threads = threads
        self._books = Books(objects)
        self._keys = JobKeys(objects, self._books)
        self._pointers = Pointers(objects, self._books, self._keys, clock, mirror)
        self.copies = HostCopies(objects, self._books, copies or Copies(COPIES, _COPY_BYTES), threads)
        self._on_published: Callable[[JobRef, VersionKey], None] = lambda *_: None

    def when_published(self, callback: Callable[[JobRef, VersionKey], None]) -> None:
        """Has `callback` called after each commit, in the thread that made it. It must be quick and raise nothing."""
        self._on_published = callback

    def register_key(self, job: JobRef, public_key: bytes, keep: int) -> None:
        """Names the job's first key and its retention; any key of the job again updates `keep`.

        Raises Conflict (the job has other keys), Rejected.
        """
        self._keys.register(job, public_key, keep)

    def rotate_key(self, signed: weights_pb2.SignedKeyRotation) -> None:
        """Hands a job over to another key; the very same rotation again changes nothing.

        Raises NotFound (no key yet), Conflict (the serial does not follow), IntegrityError, Rejected.
        """
        self._keys.rotate(signed)

    def keys(self, job: JobRef) -> tuple[bytes, list[weights_pb2.SignedKeyRotation]]:
        """The job's first key and every rotation since, for `keychain.verify_chain`. Raises NotFound."""
        return self._keys.read(job)

    def admit(self, header: weights_pb2.PublishHeader) -> Admission:
        """Judges a publish by its header, before its payload is received.

        Raises:
            Fenced: a newer learner epoch or key has taken over, or head is past this publish's serial.
            VersionTaken: another manifest holds the number.
            NotFound: the base of a delta or adapter cannot be read; a full encoding would be taken.
            IntegrityError: a signature or checksum does not match, or the key is not the job's.
            Rejected: the header makes no sense.
        """
        signed = header.manifest
        job = convert.job_from_proto(parse_manifest(signed.manifest).job)
        keys = self._keys.chain(job)
        manifest = open_manifest(keys[find_key(job, keys, signed.key_id)], signed, job)
        key = VersionKey(manifest.weight_set, manifest.version)
        layout.version_prefix(job, key)
        check_encoding(header.encoding, manifest.version, tensor_infos(manifest))
        self._check_assets(job, manifest, header.assets)
        head = self._pointers.opened(header.head) if header.HasField("head") else None
        if head is not None and (head.job, head.name, VersionKey(POLICY, head.version)) != (job, HEAD, key):
            raise Rejected("head", "the pointer that comes with a version must be head, and name it")
        record = weights_pb2.PublishHeader(manifest=signed, encoding=header.encoding)
        if head is not None:
            record.head.CopyFrom(header.head)
        admission = Admission(job, key, manifest, record, header.assets, head)
        self._pointers.repair_head(job)
        self._is_there(admission)
        self._check_base(admission)
        return admission

    def commit(self, admission: Admission, file: IO[bytes], confirm: Callable[[], None] | None = None) -> bool:
        """Checks the payload and makes the version exist, with head on it. True when the version was there already.

        Args:
            confirm: called when the payload has been proven, before anything is written; what it raises stops the
                publish.

        Raises:
            IntegrityError: the payload is not what the manifest says.
            Fenced, VersionTaken, NotFound: as `admit`, for what happened since.
        """
        if (size := file.seek(0, os.SEEK_END)) != admission.encoding.size:
            raise IntegrityError(f"the payload has {size} bytes, its encoding says {admission.encoding.size}")
        copy = self._proven(admission, file)
        if confirm is not None:
            confirm()
        job, key = admission.job, admission.key
        with self._books.changing(job) as catalog:
            existed = self._is_there(admission)
            self._check_base(admission)
            file.seek(0)
            self._write_parts(admission, file, existed)
            if not existed:
                self._create_manifest(admission)
                catalog.add_version(key)
            catalog.add(key, admission.encoding)
            if admission.head is not None:
                self._pointers.advance(admission.head, admission.record.head)
        if copy is not None:
            self.copies.put(job, key, copy)
        self._on_published(job, key)
        return existed

    def add_encoding(self, job: JobRef, key: VersionKey, encoding: weights_pb2.Encoding, data: bytes) -> bool:
        """Adds an encoding to a version, if it decodes to what the manifest says. False when it was there already.

        Raises:
            NotFound: there is no such version, or a delta's base cannot be read.
            IntegrityError: the bytes are not what the encoding says, or its result is not the version.
            Rejected: the encoding makes no sense.
        """
        manifest = self._records.manifest(job, key)
        infos = tensor_infos(manifest)
        check_encoding(encoding, key.version, infos)
        if len(data) != encoding.size or hashlib.sha256(data).digest() != encoding.sha256:
            raise IntegrityError("the payload does not match its SHA-256 or size")
        base = None
        if encoding.HasField("base_version"):
            base = self.copies.get(job, VersionKey(key.weight_set, encoding.base_version))
        decode(
            encoding,
            data,
            base.tensors if base else (),
            infos,
            threads=self._threads,
            base_infos=base.infos if base else None,
        )
        # Outside the lock, so that a publish does not wait for it; without its record it is a leftover like any other.
        path = layout.blob_path(job, encoding.sha256)
        self._objects.put(path, data)
        with self._books.changing(job) as catalog:
            if not catalog.has(key):
                raise NotFound(f"version {key.version} of {job} was retired meanwhile")
            if any(item.sha256 == encoding.sha256 for item in catalog.of(key)):
                return False
            # Retention may have removed it with another version's encoding of the same bytes.
            self._objects.size(path)
            self._objects.put(layout.encoding_path(job, key, encoding.sha256), encoding.SerializeToString())
            catalog.add(key, encoding)
        return True

    def version(self, job: JobRef, key: VersionKey) -> tuple[weights_pb2.SignedManifest, list[weights_pb2.Encoding]]:
        """The signed manifest and every encoding on hand. Raises NotFound."""
        return self._records.version(job, key).manifest, self._books.catalog(job).of(key)

    def path(self, job: JobRef, key: VersionKey, have: Collection[int], codecs: Collection[str]) -> list[Step] | None:
        """The fewest bytes to a version for someone who holds `have` and can decode `codecs` (safetensors always).

        Empty when it is one of `have`; None when there is no way, or no such version.
        """
        encodings = self._books.catalog(job).encodings(key.weight_set)
        return cheapest_path(encodings, have, key.version, {SAFETENSORS, *codecs})

    def versions(self, job: JobRef, weight_set: int, before: int | None, limit: int) -> list[int]:
        """Numbers on hand below `before`, newest first: of versions that a newcomer can get."""
        layout.versions_prefix(job, weight_set)
        numbers = sorted(reachable(self._books.catalog(job).encodings(weight_set), CODECS), reverse=True)
        return [number for number in numbers if before is None or number < before][:limit]

    def newest(self, job: JobRef, weight_set: int) -> int | None:
        """The highest number that was published, whether it can be reached or not."""
        return next(iter(self._books.catalog(job).numbers(weight_set)), None)

    def has(self, job: JobRef, key: VersionKey) -> bool:
        """Whether a version is on hand."""
        return self._books.catalog(job).has(key)

    def jobs(self) -> list[JobRef]:
        """Every job that the store holds anything of."""
        projects = [name for name in self._objects.folders("") if layout.is_name(name)]
        return [
            JobRef(project, name)
            for project in projects
            for name in self._objects.folders(project)
            if layout.is_name(name)
        ]

    def pointer(self, job: JobRef, name: str) -> State:
        """Where a pointer stands; None while there is none."""
        return self._pointers.read(job, name)

    def pointers(self, job: JobRef) -> list[weights_pb2.SignedPointer]:
        """Every pointer of a job."""
        return self._pointers.read_all(job)

    def set_pointer(self, signed: weights_pb2.SignedPointer) -> PointerState:
        """Moves a pointer, forth or back, and returns what it says; the very same pointer again changes nothing.

        Raises Conflict (the serial does not grow), Fenced (an older key), NotFound (no such version), IntegrityError,
        Rejected.
        """
        return self._pointers.move(signed)

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
        with self._books.changing(job) as catalog:
            now = self._clock()
            listing = self._objects.list(root)
            named = self._pointers.named(job)
            if self._mirror:
                named |= retention.asked_for(job, listing, now)
            gone = retention.removable(
                job,
                listing,
                catalog.all(),
                self._records.keep(job),
                named,
                now,
                lambda key: self._records.manifest(job, key).assets_sha256.hex(),
            )
            for path in gone:
                self._objects.delete(path)
            catalog.forget(job, gone)
            self._objects.sweep_staged(root, now - retention.GRACE_S)
        return len(gone)

    def _is_there(self, admission: Admission) -> bool:
        """Whether this very manifest is published. Raises Fenced, VersionTaken."""
        job, key, head = admission.job, admission.key, admission.head
        present = self._records.pointer(job, HEAD)
        try:
            stored = self._records.version(job, key).manifest.manifest
        except NotFound:
            stored = None
        # Who sends a version's bytes once more and moves nothing only mends what was lost, whoever published it.
        mends = head is None and stored == admission.record.manifest.manifest
        if not self._mirror and not mends:
            self._check_epoch(admission, present)
        if stored is not None and stored != admission.record.manifest.manifest:
            raise VersionTaken(f"another manifest holds version {key.version} of {job}")
        if self._mirror:
            return stored is not None
        if stored is None:
            self._keys.check_newest(job, admission.record.manifest.key_id, "the manifest")
            if present and head and head.serial <= present[0].serial:
                raise Fenced(f"head of {job} has serial {present[0].serial}; {head.serial} is not above it")
        if head and not (present and present[1].pointer == admission.record.head.pointer):
            self._pointers.check_signer(head, admission.record.head, present)
        return stored is not None

    def _check_epoch(self, admission: Admission, head: State) -> None:
        job, weight_set = admission.job, admission.key.weight_set
        rivals = {VersionKey(weight_set, number) for number in self._books.catalog(job).numbers(weight_set)[:1]}
        if head is not None:
            rivals.add(VersionKey(POLICY, head[0].version))
        epoch = admission.manifest.lineage.learner_epoch
        for rival in rivals:
            with contextlib.suppress(NotFound):
                newest = self._records.manifest(job, rival).lineage.learner_epoch
                if newest > epoch:
                    raise Fenced(f"learner epoch {epoch} of {job} was superseded by epoch {newest}")

    def _check_base(self, admission: Admission) -> None:
        """Raises NotFound: what the encoding is decoded against is not on hand. Rejected: it has other tensors."""
        base = admission.base
        if base is None:
            return
        try:
            manifest = self._records.manifest(admission.job, base)
        except NotFound as error:
            raise NotFound(f"{error}, the encoding's base: publish a full encoding") from None
        if manifest.layout_sha256 != admission.manifest.layout_sha256:
            raise Rejected("base", f"version {base.version} has other tensors: publish a full encoding")

    def _check_assets(self, job: JobRef, manifest: weights_pb2.Manifest, assets: bytes) -> None:
        if assets:
            if hashlib.sha256(assets).digest() != manifest.assets_sha256:
                raise IntegrityError("the asset bundle does not match its SHA-256 in the manifest")
            return
        try:
            self._objects.size(layout.assets_path(job, manifest.assets_sha256))
        except NotFound:
            raise Rejected("assets", "the store has not seen this version's asset bundle: send it along") from None

    def _proven(self, admission: Admission, file: IO[bytes]) -> HostCopy | None:
        """Checks a payload against the manifest. The tensors are None where they need, or may, not be held."""
        encoding, infos = admission.encoding, tensor_infos(admission.manifest)
        if encoding.codec == SAFETENSORS:
            keep = total_bytes(infos) <= self.copies.max_bytes
            tensors = payload.check(file, encoding.sha256, infos, keep=keep)
            return HostCopy(tuple(infos), tensors) if keep else None
        file.seek(0)
        data = file.read()
        if hashlib.sha256(data).digest() != encoding.sha256:
            raise IntegrityError("the payload does not match its SHA-256")
        if encoding in self._books.catalog(admission.job).of(admission.key):
            # Proven when it was accepted, and the very same bytes.
            return None
        base = self.copies.get(admission.job, admission.base) if admission.base else None
        before, proven = (base.tensors, base.infos) if base else ((), None)
        tensors = decode(encoding, data, before, infos, threads=self._threads, base_infos=proven)
        return HostCopy(tuple(infos), tensors, beside=is_adapter(encoding))

    def _write_parts(self, admission: Admission, file: IO[bytes], existed: bool) -> None:
        job, key, encoding = admission.job, admission.key, admission.encoding
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

    def _create_manifest(self, admission: Admission) -> None:
        """The commit. Raises VersionTaken."""
        path, record = layout.manifest_path(admission.job, admission.key), admission.record.SerializeToString()
        try:
            self._objects.create(path, record)
        except Conflict:
            # A remote store's client repeats a request whose answer was lost, and then meets its own object.
            if self._objects.get(path) != record:
                raise VersionTaken(f"another manifest holds {path}") from None
