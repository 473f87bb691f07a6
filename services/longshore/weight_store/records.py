"""What the store keeps of a job, read as typed values. Signatures were checked on the way in, not here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import google.protobuf.message

from longshore.errors import IntegrityError, NotFound
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store import layout
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import Objects
from longshore.weight_store.version import PointerState, parse_manifest, pointer_state

M = TypeVar("M", bound=google.protobuf.message.Message)


class Records:
    """Reads of one object store; methods raise NotFound, Unavailable, and IntegrityError for what is damaged."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def public_key(self, job: JobRef, key_id: str) -> bytes:
        """Raises IntegrityError when the job has no such key."""
        try:
            return self._objects.get(layout.key_path(job, key_id))
        except NotFound:
            raise IntegrityError(f"{key_id} is not a registered key of {job}") from None

    def rotations(self, job: JobRef) -> list[weights_pb2.SignedKeyRotation]:
        """The job's key rotations, oldest first."""
        paths = sorted(item.path for item in self._objects.list(layout.rotations_prefix(job)))
        return [_parsed(weights_pb2.SignedKeyRotation(), self._objects.get(path)) for path in paths]

    def keep(self, job: JobRef) -> int:
        """Newest versions that the job's retention keeps."""
        try:
            return int(self._objects.get(layout.keep_path(job)))
        except ValueError:
            raise IntegrityError(f"the stored retention of {job} is damaged") from None

    def version(self, job: JobRef, key: VersionKey) -> weights_pb2.PublishHeader:
        """A version's `manifest` object: the signed manifest and the head that came with it."""
        try:
            data = self._objects.get(layout.manifest_path(job, key))
        except NotFound:
            raise NotFound(f"{job} has no version {key.version}") from None
        return _parsed(weights_pb2.PublishHeader(), data)

    def manifest(self, job: JobRef, key: VersionKey) -> weights_pb2.Manifest:
        return parse_manifest(self.version(job, key).manifest.manifest)

    def encoding(self, path: str) -> weights_pb2.Encoding:
        """Raises IntegrityError when the record is not the one that its name says."""
        encoding = _parsed(weights_pb2.Encoding(), self._objects.get(path))
        if encoding.sha256.hex() != path.rpartition("/")[2]:
            raise IntegrityError(f"the stored encoding {path} is damaged")
        return encoding

    def pointer(self, job: JobRef, name: str) -> tuple[PointerState, weights_pb2.SignedPointer] | None:
        """None while there is none."""
        try:
            data = self._objects.get(layout.pointer_path(job, name))
        except NotFound:
            return None
        signed = _parsed(weights_pb2.SignedPointer(), data)
        return pointer_state(signed), signed

    def pointers(self, job: JobRef) -> Iterator[tuple[PointerState, weights_pb2.SignedPointer]]:
        prefix = layout.pointers_prefix(job)
        for item in self._objects.list(prefix):
            found = self.pointer(job, item.path.removeprefix(f"{prefix}/"))
            if found is not None:
                yield found


def _parsed(message: M, data: bytes) -> M:
    try:
        message.ParseFromString(data)
    except google.protobuf.message.DecodeError:
        raise IntegrityError(f"a stored {message.DESCRIPTOR.name} is damaged") from None
    return message
