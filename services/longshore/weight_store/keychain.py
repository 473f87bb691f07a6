"""A job's keys, oldest first: the one that it was registered with, and each that the one before it signed.

Manifests and pointers that any of them signed stay valid; new ones must bear the newest.
"""

from __future__ import annotations

from collections.abc import Sequence

import google.protobuf.message

from longshore import signing
from longshore.errors import IntegrityError, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.rpc import convert
from longshore.types import JobRef

# More would make every reader check more; a year of weekly rotations fits.
MAX_ROTATIONS = 1000


def sign_rotation(
    key: signing.SigningKey, job: JobRef, public_key: bytes, serial: int, created_at: float
) -> weights_pb2.SignedKeyRotation:
    """Hands the job over to `public_key`; `key` is the newest so far, `serial` one more than the last rotation's."""
    data = weights_pb2.KeyRotation(
        job=convert.job_to_proto(job),
        public_key=public_key,
        serial=serial,
        created_at=convert.timestamp(created_at),
    ).SerializeToString(deterministic=True)
    return weights_pb2.SignedKeyRotation(
        rotation=data, key_id=key.key_id, signature=key.sign(signing.ROTATION_DOMAIN, data)
    )


def parse_rotation(signed: weights_pb2.SignedKeyRotation) -> weights_pb2.KeyRotation:
    """Reads a rotation without checking it. Raises Rejected."""
    rotation = weights_pb2.KeyRotation()
    try:
        rotation.ParseFromString(signed.rotation)
    except google.protobuf.message.DecodeError:
        raise Rejected("malformed", "not a serialised key rotation") from None
    return rotation


def verify_chain(job: JobRef, first_key: bytes, rotations: Sequence[weights_pb2.SignedKeyRotation]) -> list[bytes]:
    """The job's public keys, oldest first, for someone who trusts the first.

    Raises:
        IntegrityError: a rotation is not signed by the key before it, is of another job or out of turn, or brings back
            a key that was rotated away.
        Rejected: a rotation is signed, but makes no sense.
    """
    keys = [first_key]
    if len(rotations) > MAX_ROTATIONS:
        raise Rejected("rotation", f"{len(rotations)} rotations; at most {MAX_ROTATIONS} are allowed")
    for serial, signed in enumerate(rotations, 1):
        signing.verify(keys[-1], signing.ROTATION_DOMAIN, signed.rotation, signed.signature)
        rotation = parse_rotation(signed)
        if (rotation.job.project, rotation.job.job) != (job.project, job.job):
            raise IntegrityError(f"the rotation is of {rotation.job.project}/{rotation.job.job}, not of {job}")
        if rotation.serial != serial:
            raise IntegrityError(f"rotation {rotation.serial} stands where {serial} is expected")
        if len(rotation.public_key) != signing.PUBLIC_KEY_BYTES:
            raise Rejected("rotation", f"a public key has {signing.PUBLIC_KEY_BYTES} bytes")
        if rotation.public_key in keys:
            raise IntegrityError(f"rotation {serial} brings back key {signing.key_id(rotation.public_key)}")
        keys.append(rotation.public_key)
    return keys


def find_key(job: JobRef, keys: Sequence[bytes], key_id: str) -> int:
    """Position of the key that an id names. Raises IntegrityError: none of the job's keys has it."""
    for position, key in enumerate(keys):
        if signing.key_id(key) == key_id:
            return position
    raise IntegrityError(f"{key_id} is not a registered key of {job}")
