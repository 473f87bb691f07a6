"""A version on its way to the store: hashed, signed, and cut into messages that can be sent any number of times."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from longshore.proto.v1 import weights_pb2
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store import bundle, payload
from longshore.weight_store.payload import Tensor
from longshore.weight_store.version import HEAD, VersionDraft, build_manifest, sign_manifest, sign_pointer

# Renewed by every publish; long enough for the slowest step and for a finished job to be looked at.
HEAD_LIFETIME_S = 30 * 86400.0


@dataclass(frozen=True)
class Parcel:
    """A header and the payload's parts, in order."""

    header: weights_pb2.PublishHeader
    parts: list[bytes]
    assets_sha256: bytes

    async def messages(self) -> AsyncIterator[weights_pb2.PublishRequest]:
        """The stream of a Publish call."""
        yield weights_pb2.PublishRequest(header=self.header)
        for block in payload.blocks(self.parts):
            yield weights_pb2.PublishRequest(chunk=block)


def pack(
    job: JobRef,
    key: SigningKey,
    draft: VersionDraft,
    tensors: Sequence[Tensor],
    assets: Mapping[str, bytes],
    serial: int,
) -> Parcel:
    """Hashes and signs a version, and a head that names it. Blocks for as long as hashing takes twice.

    Raises:
        ValueError: the draft or a tensor makes no sense.
        Rejected: the assets cannot be a bundle.
    """
    infos = [payload.tensor_info(tensor) for tensor in tensors]
    archive = bundle.pack(assets)
    assets_sha256 = hashlib.sha256(archive).digest()
    manifest = build_manifest(job, draft, infos, assets_sha256)
    parts = [payload.encode_header(infos), *(tensor.data for tensor in tensors)]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    header = weights_pb2.PublishHeader(
        manifest=sign_manifest(key, manifest),
        encoding=weights_pb2.Encoding(
            kind=weights_pb2.ENCODING_KIND_FULL,
            sha256=whole.digest(),
            size=sum(len(part) for part in parts),
            codec=payload.CODEC,
        ),
        assets=archive,
        head=sign_pointer(key, job, HEAD, draft.version, serial, time.time() + HEAD_LIFETIME_S),
    )
    return Parcel(header, parts, assets_sha256)
