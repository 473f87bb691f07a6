"""Policy versions as values, and their signed manifests and pointers.

A learner describes a version by a VersionDraft; readers get a PolicyVersion, of which every part was checked against
the learner's public key. Knows protobuf and signatures, not how bytes travel or where they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import google.protobuf.message

from longshore import signing
from longshore.errors import IntegrityError, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.rpc import convert
from longshore.types import JobRef
from longshore.weight_store.payload import DTYPES, Tensor, TensorInfo, layout_digest, tensor_info

HEAD = "head"
# Holds a version in the store while the learner has it evaluated.
EVALUATED = "pin/evaluated"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CanaryProbe:
    """Log-probs that the learner computed for fixed tokens under a version.

    Example: CanaryProbe(token_ids=(5, 6, 7), logprobs=(-1.5, -0.25))  # one fewer than tokens
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class VersionDraft:
    """What a learner says of a version that it publishes, beside the tensors.

    Example: VersionDraft(version=3, train_step=3, learner_epoch=1, parent_version=2, canaries=(), created_at=1.8e9)
    """

    version: int
    # Optimizer steps taken.
    train_step: int
    learner_epoch: int
    # The job's version that this one was trained from; None for the first.
    parent_version: int | None
    canaries: tuple[CanaryProbe, ...]
    # Unix seconds.
    created_at: float


@dataclass(frozen=True)
class PolicyVersion:
    """A published version whose signature was checked; with tensors, so was every one of them."""

    version: int
    train_step: int
    learner_epoch: int
    # Hex; the address of the asset bundle.
    assets_sha256: str
    # Hex; equal for versions whose tensors have the same order, names, shapes and dtypes.
    layout_sha256: str
    # Hex; equal exactly for versions with the same weights.
    checksum: str
    canaries: tuple[CanaryProbe, ...]
    # In the manifest's order; None when only the manifest was asked for.
    tensors: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class PointerState:
    """What a pointer says."""

    job: JobRef
    name: str
    version: int
    serial: int
    # Unix seconds.
    expires_at: float


def checksum_of(tensors: Sequence[Tensor]) -> str:
    """The PolicyVersion.checksum that these tensors would have. Raises ValueError when bytes do not fit a shape."""
    return combined_checksum([tensor_info(tensor) for tensor in tensors])


def combined_checksum(infos: Sequence[TensorInfo]) -> str:
    """Hex SHA-256 over the tensors' checksums in order."""
    return hashlib.sha256(b"".join(info.blake3 for info in infos)).hexdigest()


def build_manifest(
    job: JobRef, draft: VersionDraft, infos: Sequence[TensorInfo], assets_sha256: bytes
) -> weights_pb2.Manifest:
    """Raises ValueError for a draft that no reader would accept."""
    _check_tensors(infos)
    for canary in draft.canaries:
        if len(canary.logprobs) != len(canary.token_ids) - 1:
            raise ValueError(f"a canary of {len(canary.token_ids)} tokens has {len(canary.logprobs)} log-probs")
    reference = convert.job_to_proto(job)
    has_parent = draft.parent_version is not None
    return weights_pb2.Manifest(
        schema_version=_SCHEMA_VERSION,
        job=reference,
        version=draft.version,
        weight_set=weights_pb2.WEIGHT_SET_POLICY,
        lineage=weights_pb2.Lineage(
            parent_job=reference if has_parent else None,
            parent_version=draft.parent_version,
            train_step=draft.train_step,
            learner_epoch=draft.learner_epoch,
        ),
        tensors=[
            weights_pb2.TensorInfo(name=info.name, dtype=info.dtype, shape=info.shape, blake3=info.blake3)
            for info in infos
        ],
        layout_sha256=layout_digest(infos),
        assets_sha256=assets_sha256,
        canaries=[weights_pb2.Canary(token_ids=item.token_ids, logprobs=item.logprobs) for item in draft.canaries],
        created_at=convert.timestamp(draft.created_at),
    )


def sign_manifest(key: signing.SigningKey, manifest: weights_pb2.Manifest) -> weights_pb2.SignedManifest:
    data = manifest.SerializeToString(deterministic=True)
    return weights_pb2.SignedManifest(
        manifest=data, key_id=key.key_id, signature=key.sign(signing.MANIFEST_DOMAIN, data)
    )


def sign_pointer(
    key: signing.SigningKey, job: JobRef, name: str, version: int, serial: int, expires_at: float
) -> weights_pb2.SignedPointer:
    data = weights_pb2.Pointer(
        job=convert.job_to_proto(job),
        name=name,
        version=version,
        serial=serial,
        expires_at=convert.timestamp(expires_at),
    ).SerializeToString(deterministic=True)
    return weights_pb2.SignedPointer(pointer=data, key_id=key.key_id, signature=key.sign(signing.POINTER_DOMAIN, data))


def open_manifest(public_key: bytes, signed: weights_pb2.SignedManifest, job: JobRef) -> weights_pb2.Manifest:
    """Checks a manifest's signature, job and inner sense.

    Raises:
        IntegrityError: another key signed it, or it belongs to another job.
        Rejected: it is signed, but makes no sense to this version of Longshore.
    """
    signing.verify(public_key, signing.MANIFEST_DOMAIN, signed.manifest, signed.signature)
    manifest = parse_manifest(signed.manifest)
    if (manifest.job.project, manifest.job.job) != (job.project, job.job):
        raise IntegrityError(f"the manifest is of {manifest.job.project}/{manifest.job.job}, not of {job}")
    if manifest.schema_version != _SCHEMA_VERSION:
        raise Rejected("schema", f"manifest schema {manifest.schema_version} is not {_SCHEMA_VERSION}")
    if len(manifest.assets_sha256) != 32:
        raise Rejected("malformed", "the manifest names no asset bundle")
    infos = tensor_infos(manifest)
    try:
        _check_tensors(infos)
    except ValueError as error:
        raise Rejected("tensors", str(error)) from None
    if layout_digest(infos) != manifest.layout_sha256:
        raise Rejected("layout", "layout_sha256 is not that of the manifest's tensors")
    return manifest


def open_pointer(public_key: bytes, signed: weights_pb2.SignedPointer, job: JobRef) -> PointerState:
    """Checks a pointer's signature and job; expiry and serial are the reader's to judge.

    Raises:
        IntegrityError: another key signed it, or it belongs to another job.
        Rejected: it is signed, but cannot be read.
    """
    signing.verify(public_key, signing.POINTER_DOMAIN, signed.pointer, signed.signature)
    state = pointer_state(signed)
    if state.job != job:
        raise IntegrityError(f"the pointer is of {state.job}, not of {job}")
    return state


def parse_manifest(data: bytes) -> weights_pb2.Manifest:
    """Reads a manifest without checking it. Raises Rejected."""
    manifest = weights_pb2.Manifest()
    try:
        manifest.ParseFromString(data)
    except google.protobuf.message.DecodeError:
        raise Rejected("malformed", "not a serialised manifest") from None
    return manifest


def pointer_state(signed: weights_pb2.SignedPointer) -> PointerState:
    """What a pointer says, without checking it. Raises Rejected."""
    pointer = weights_pb2.Pointer()
    try:
        pointer.ParseFromString(signed.pointer)
    except google.protobuf.message.DecodeError:
        raise Rejected("malformed", "not a serialised pointer") from None
    return PointerState(
        job=convert.job_from_proto(pointer.job),
        name=pointer.name,
        version=pointer.version,
        serial=pointer.serial,
        expires_at=convert.seconds(pointer.expires_at),
    )


def tensor_infos(manifest: weights_pb2.Manifest) -> list[TensorInfo]:
    """The manifest's tensors, in its order."""
    return [TensorInfo(item.name, item.dtype, tuple(item.shape), item.blake3) for item in manifest.tensors]


def policy_version(manifest: weights_pb2.Manifest, tensors: tuple[Tensor, ...] | None) -> PolicyVersion:
    return PolicyVersion(
        version=manifest.version,
        train_step=manifest.lineage.train_step,
        learner_epoch=manifest.lineage.learner_epoch,
        assets_sha256=manifest.assets_sha256.hex(),
        layout_sha256=manifest.layout_sha256.hex(),
        checksum=combined_checksum(tensor_infos(manifest)),
        canaries=tuple(CanaryProbe(tuple(item.token_ids), tuple(item.logprobs)) for item in manifest.canaries),
        tensors=tensors,
    )


def _check_tensors(infos: Sequence[TensorInfo]) -> None:
    names = {info.name for info in infos}
    if not infos or len(names) != len(infos) or names & {"", "__metadata__"}:
        raise ValueError("a version needs tensors, each with a name of its own")
    for info in infos:
        if info.dtype not in DTYPES:
            raise ValueError(f"tensor {info.name}: dtype {info.dtype!r} is none of {', '.join(DTYPES)}")
