"""Where things lie in the object store, and which names may become part of a path.

<project>/<job>/keys/<key id>                                   32 raw bytes: the first key
                rotations/<serial>                              SignedKeyRotation
                keep                                            decimal number
                assets/<sha256>                                 asset bundle
                blobs/<sha256>                                  encoding's bytes
                versions/<weight set>/<version>/encodings/<sha256>   Encoding
                versions/<weight set>/<version>/manifest        PublishHeader without assets: the commit
                pointers/<name>                                 SignedPointer
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from longshore.errors import Rejected
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef

MAX_VERSION = 10**12 - 1

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_POINTER = re.compile(r"head|serving|(?:pin|channel)/[a-z0-9][a-z0-9._-]{0,127}")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
WEIGHT_SETS: dict[int, str] = {
    weights_pb2.WEIGHT_SET_POLICY: "policy",
    weights_pb2.WEIGHT_SET_ADAPTER: "adapter",
    weights_pb2.WEIGHT_SET_VALUE: "value",
}
_NUMBERS = {name: number for number, name in WEIGHT_SETS.items()}


@dataclass(frozen=True, order=True)
class VersionKey:
    """A version of one weight set of a job."""

    # Value of the WeightSet enum.
    weight_set: int
    version: int


def job_prefix(job: JobRef) -> str:
    """Raises Rejected for a project or job whose name cannot be a folder's."""
    for name in (job.project, job.job):
        if not is_name(name):
            raise Rejected("name", f"{name!r} is not a project's or job's name")
    return f"{job.project}/{job.job}"


def is_name(name: str) -> bool:
    """Whether a project or a job may have this name."""
    return _NAME.fullmatch(name) is not None


def key_path(job: JobRef, key_id: str) -> str:
    if not _KEY_ID.fullmatch(key_id):
        raise Rejected("key_id", f"{key_id!r} is not 16 hex digits")
    return f"{keys_prefix(job)}/{key_id}"


def keys_prefix(job: JobRef) -> str:
    return f"{job_prefix(job)}/keys"


def rotation_path(job: JobRef, serial: int) -> str:
    return f"{rotations_prefix(job)}/{serial:06d}"


def rotations_prefix(job: JobRef) -> str:
    return f"{job_prefix(job)}/rotations"


def keep_path(job: JobRef) -> str:
    return f"{job_prefix(job)}/keep"


def assets_path(job: JobRef, sha256: bytes) -> str:
    return f"{job_prefix(job)}/assets/{_digest(sha256)}"


def blob_path(job: JobRef, sha256: bytes) -> str:
    return f"{job_prefix(job)}/blobs/{_digest(sha256)}"


def versions_prefix(job: JobRef, weight_set: int) -> str:
    if weight_set not in WEIGHT_SETS:
        raise Rejected("weight_set", f"unknown weight set {weight_set}")
    return f"{job_prefix(job)}/versions/{WEIGHT_SETS[weight_set]}"


def version_prefix(job: JobRef, key: VersionKey) -> str:
    if not 0 <= key.version <= MAX_VERSION:
        raise Rejected("version", f"version {key.version} has more than 12 digits")
    return f"{versions_prefix(job, key.weight_set)}/{key.version:012d}"


def manifest_path(job: JobRef, key: VersionKey) -> str:
    return f"{version_prefix(job, key)}/manifest"


def encodings_prefix(job: JobRef, key: VersionKey) -> str:
    return f"{version_prefix(job, key)}/encodings"


def encoding_path(job: JobRef, key: VersionKey, sha256: bytes) -> str:
    return f"{encodings_prefix(job, key)}/{_digest(sha256)}"


def pointers_prefix(job: JobRef) -> str:
    return f"{job_prefix(job)}/pointers"


def pointer_path(job: JobRef, name: str) -> str:
    if not _POINTER.fullmatch(name):
        raise Rejected("pointer", f"{name!r} is not head, serving, pin/<name> or channel/<name>")
    return f"{pointers_prefix(job)}/{name}"


def version_of(job: JobRef, path: str) -> VersionKey | None:
    """The version that an object of the job belongs to; None for any other object."""
    parts = path.removeprefix(f"{job_prefix(job)}/").split("/")
    if len(parts) < 4 or parts[0] != "versions" or parts[1] not in _NUMBERS or not parts[2].isdigit():
        return None
    return VersionKey(_NUMBERS[parts[1]], int(parts[2]))


def _digest(sha256: bytes) -> str:
    if len(sha256) != 32:
        raise Rejected("sha256", f"a SHA-256 has 32 bytes, got {len(sha256)}")
    return sha256.hex()
