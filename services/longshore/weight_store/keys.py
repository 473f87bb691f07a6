"""Whose signature a job's manifests and pointers must bear: registration and rotation of keys, as stored."""

from __future__ import annotations

from pathlib import PurePosixPath

from longshore import signing
from longshore.errors import Conflict, Fenced, IntegrityError, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.rpc import convert
from longshore.types import JobRef
from longshore.weight_store import keychain, layout
from longshore.weight_store.books import Books
from longshore.weight_store.objects import Objects
from longshore.weight_store.records import Records


class JobKeys:
    """The keys of every job in one store."""

    def __init__(self, objects: Objects, books: Books) -> None:
        self._objects = objects
        self._records = Records(objects)
        self._books = books

    def register(self, job: JobRef, public_key: bytes, keep: int) -> None:
        """Names the job's first key and its retention; any key of the job again updates `keep`.

        Raises:
            Conflict: the job has other keys.
            Rejected: not a key, or nothing would be kept.
        """
        if len(public_key) != signing.PUBLIC_KEY_BYTES or keep < 1:
            raise Rejected("malformed", "a key has 32 bytes, and at least one version is kept")
        with self._books.lock(job):
            known = self._chain(job)
            if known and public_key not in known:
                raise Conflict(f"{job} has another key: hand it over with a rotation that the newest key signs")
            # The key comes last: a registered job always says how many versions it keeps.
            self._objects.put(layout.keep_path(job), str(keep).encode())
            if not known:
                self._objects.put(layout.key_path(job, signing.key_id(public_key)), public_key)

    def rotate(self, signed: weights_pb2.SignedKeyRotation) -> None:
        """Hands the job over to another key; the very same rotation again changes nothing.

        Raises:
            NotFound: the job has no key yet.
            Conflict: the serial does not follow the newest rotation's.
            IntegrityError, Rejected: the newest key did not sign it, or it makes no sense.
        """
        job = convert.job_from_proto(keychain.parse_rotation(signed).job)
        with self._books.lock(job):
            first, rotations = self.read(job)
            serial = keychain.parse_rotation(signed).serial
            if any(signed.rotation == known.rotation for known in rotations):
                return
            if serial != len(rotations) + 1:
                raise Conflict(f"{job} has {len(rotations)} rotations: serial {serial} does not follow")
            keychain.verify_chain(job, first, [*rotations, signed])
            self._objects.create(layout.rotation_path(job, serial), signed.SerializeToString())

    def read(self, job: JobRef) -> tuple[bytes, list[weights_pb2.SignedKeyRotation]]:
        """The first key, and every rotation since. Raises NotFound: the job has no key."""
        names = [PurePosixPath(item.path).name for item in self._objects.list(layout.keys_prefix(job))]
        if not names:
            raise NotFound(f"{job} has no registered key")
        return self._records.public_key(job, names[0]), self._records.rotations(job)

    def chain(self, job: JobRef) -> list[bytes]:
        """The job's keys, oldest first. Raises IntegrityError: it has none, or what is stored is damaged."""
        found = self._chain(job)
        if not found:
            raise IntegrityError(f"{job} has no key: it is not a registered key of any job that signed this")
        return found

    def check_newest(self, job: JobRef, key_id: str, what: str) -> None:
        """Raises Fenced: the key that signed was handed over."""
        newest = signing.key_id(self.chain(job)[-1])
        if key_id != newest:
            raise Fenced(f"{what} of {job} is signed by key {key_id}, which was superseded by key {newest}")

    def _chain(self, job: JobRef) -> list[bytes]:
        try:
            first, rotations = self.read(job)
        except NotFound:
            return []
        return keychain.verify_chain(job, first, rotations)
